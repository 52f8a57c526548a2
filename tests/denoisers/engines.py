"""The table of denoisers on the OpenVINO engine: each row samples one image or clip in torch and on the engine.

`python benchmarks/denoisers.py --engine` writes it into docs/models.md. Each row is a tiny random pipeline that is
rounded to nearest at W8A8, without learning. Finished rows are noted in a file with a hash of the code, so that an
interrupted table continues, and no row is of other code.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import reduce
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, SelectConfig
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.pipeline import put_on_engine
from edadm_cli.errors import EdadmError
from edadm_cli.export.folder import write_pipeline
from edadm_cli.integrations.quantizer import EdadmConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.quant.plan import format_version
from edadm_cli.select import stage as select
from tests.denoisers.page import ROOT, update_table, write_table
from tests.denoisers.rows import ROWS, Row
from tests.denoisers.table import code_sha256, entry_with, example_images, quick_recipe

CPU = torch.device("cpu")
NOTES = ROOT / "build" / "denoisers-openvino.jsonl"
_TABLE = "denoisers on OpenVINO"
W8A8 = BitWidth.parse("w8a8")
LARGEST_DISTANCE = 0.2
"""The largest relative L2 distance that counts as running.

Codes next to a tie may go the other way, and tiny random networks amplify that. A graph that computes something else is
at a distance of about one.
"""


@dataclass(frozen=True)
class EngineResult:
    """What became of a row on the engine.

    Attributes:
        title: The title of the row.
        denoiser: The class of the denoiser.
        prediction: The relative L2 distance of one prediction to torch; the largest one of several denoisers.
        latents: The relative L2 distance of the final latents to those of torch.
        refusal: Why it does not run, or not like torch; `None` if it does.
    """

    title: str
    denoiser: str
    prediction: float = 0.0
    latents: float = 0.0
    refusal: str | None = None


def measure_on_engine(row: Row) -> EngineResult:
    """Samples a row in torch and on the engine."""
    folder = Path(tempfile.mkdtemp(prefix="edadm-engine-table-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measured(row, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(row: Row, folder: Path) -> EngineResult:
    torch.manual_seed(0)
    pipeline = row.build()
    pipeline.save_pretrained(folder / "model")
    name = type(_denoiser_of(pipeline)).__name__
    run = RunFolder(folder / "run")
    collecting = CollectConfig(
        model=str(folder / "model"),
        num_trajectories=2,
        num_steps=row.num_steps,
        batch_size=row.batch_size,
        guidance_scale=row.guidance,
        images=example_images(folder / "images") if row.images else None,
        device="cpu",
    )
    try:
        with entry_with(row.call):
            collect.run(collecting, run)
        select.run(SelectConfig(device="cpu", strategy="uniform"), run)
        model = _export(run, folder / "export")
        prediction, latents = _distances(run, model)
    except EdadmError as error:
        places = {str(folder / "model"): "the model", str(folder / "export"): "the export"}
        message = reduce(lambda text, place: text.replace(place, places[place]), places, error.message)
        return EngineResult(row.title, name, refusal=message)
    except Exception as error:  # noqa: BLE001 (a row of the table, not the end of it)
        return EngineResult(row.title, name, refusal=f"internal error: {type(error).__name__}: {error}"[:300])
    differs = f"its final latents differ from those of torch by a relative L2 of {latents:.2f}"
    refusal = None if max(prediction, latents) < LARGEST_DISTANCE else differs
    return EngineResult(row.title, name, prediction, latents, refusal)


def _export(run: RunFolder, folder: Path) -> LoadedModel:
    """Returns the pipeline of a run, loaded from an export whose denoisers are rounded to nearest."""
    collected = CollectedRun.open(run)
    model = collected.load(CPU, torch.float32)
    configs = {}
    for place, each in model.by_denoiser().items():
        calibration = CalibrationSet.load(run.open("select").within(place))
        call = calibration.call(range(len(calibration)), CPU, torch.float32)
        with torch.no_grad():
            plan = quantize_to_nearest(each.denoiser, quick_recipe(0), W8A8, [call])
        config = EdadmConfig(format_version(plan), str(W8A8), "default", plan.model_dump(mode="json"))
        configs[each.denoiser_name] = config.to_dict()
    write_pipeline(model, folder, configs)
    return load_model(str(folder), CPU, torch.float32, collected.entry)


@torch.no_grad()
def _distances(run: RunFolder, model: LoadedModel) -> tuple[float, float]:
    """Returns the distance of a prediction, and that of the final latents, between torch and the engine."""
    sampling = CollectedRun.open(run).sampling

    def latents() -> Tensor:
        return sample(
            model,
            seeds=sampling.seeds[:1],
            prompts=None if sampling.prompts is None else list(sampling.prompts[:1]),
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
        ).latents

    in_torch, predictions, compiled = latents(), [], {}
    for place, each in model.by_denoiser().items():
        calibration = CalibrationSet.load(run.open("select").within(place))
        args, kwargs = calibration.call(range(1), CPU, torch.float32)
        compiled[place] = OpenVinoEngine().compile(each.denoiser, args, kwargs, EngineOptions(CPU))
        expected, actual = each.denoiser(*args, **kwargs), compiled[place](*args, **kwargs)
        if not bool(_rows(expected).any()):
            raise EdadmError("its tiny network predicts zeros, so that nothing is compared.")
        predictions.append(relative_l2(_rows(actual), _rows(expected)))
    for place, each in model.by_denoiser().items():
        put_on_engine(each, compiled[place])
    return max(predictions), relative_l2(latents(), in_torch)


def _rows(output: Any) -> Tensor:
    prediction = output[0]
    return prediction if isinstance(prediction, Tensor) else torch.stack(tuple(prediction))


class Worker:
    """A process that samples rows one after the other; another one follows if a library ends it."""

    def __init__(self) -> None:
        self._pool = self._started()

    def measure(self, row: Row) -> EngineResult:
        """Samples a row there."""
        try:
            return self._pool.submit(_titled, row.title).result()
        except BrokenProcessPool:
            self._pool = self._started()
            name = type(_denoiser_of(row.build())).__name__
            return EngineResult(row.title, name, refusal="OpenVINO crashes and ends its process.")

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"))


def _titled(title: str) -> EngineResult:
    return measure_on_engine(next(row for row in ROWS if row.title == title))


def _denoiser_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def engine_results(rows: tuple[Row, ...], notes: Path, jobs: int = 1) -> list[EngineResult]:
    """Measures rows that the file of notes does not hold yet, and prints each result as soon as it is there.

    Args:
        rows: The rows.
        notes: A file with one finished row per line. Rows of this code that it holds are not measured again.
        jobs: The number of processes.
    """
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
    of_this_code = (fact for line in lines if (fact := json.loads(line)).pop("code", None) == code_sha256())
    results = {result.title: result for result in (EngineResult(**fact) for fact in of_this_code)}
    notes.parent.mkdir(parents=True, exist_ok=True)
    local = threading.local()
    missing = [row for row in rows if row.title not in results]
    with ThreadPoolExecutor(jobs, initializer=lambda: setattr(local, "worker", Worker())) as threads:
        for future in as_completed([threads.submit(lambda row: local.worker.measure(row), row) for row in missing]):
            result = results[future.result().title] = future.result()
            with notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result) | {"code": code_sha256()}) + "\n")
            print(engine_markdown([result]).splitlines()[-1], flush=True)
    return [results[row.title] for row in rows]


def engine_markdown(results: list[EngineResult]) -> str:
    """Returns the table, one line per row."""
    lines = ["| denoiser | as in | OpenVINO engine |", "|---|---|---|"]
    for result in results:
        refusal = result.refusal
        if refusal is not None:
            refusal = f"{'differs' if result.latents else 'refused'}: {refusal}".replace("|", "/")
        lines.append(f"| `{result.denoiser}` | {result.title} | {refusal or 'runs'} |")
    return "\n".join(lines) + "\n"


def write_engine_table(only: list[str] | None, is_update: bool, notes: Path, jobs: int) -> None:
    """Writes the table into docs/models.md, or prints the rows of some builders.

    Args:
        only: The names of the builders; `None` for all rows.
        is_update: Whether the rows of these builders replace those in docs/models.md, or are added there.
        notes: The file for `engine_results`.
        jobs: The number of processes.
    """
    if only is None:
        write_table(_TABLE, engine_markdown(engine_results(ROWS, notes, jobs)))
        notes.unlink()
        return
    worker = Worker()
    for row in ROWS:
        if row.build.__name__ in only:
            line = engine_markdown([worker.measure(row)]).splitlines()[-1]
            print(line, flush=True)
            if is_update:
                update_table(_TABLE, [each.title for each in ROWS], line)
