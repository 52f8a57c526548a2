"""The table of denoisers: each row is a tiny random pipeline that goes through the chain, or the reason why not.

`python benchmarks/denoisers.py` writes the table into docs/models.md. It notes each finished row in a file with a hash
of the code, so that a table that was interrupted goes on where it stopped, and no row is of other code. `--jobs 4`
shares the rows among four processes. With `--only NAME ...` it prints the rows of these builders alone and writes
nothing, unless `--update` puts them into the table; the names are those of the functions in the modules beside this
one.
With `--engine`, all of this is about the table of the OpenVINO engine.
"""

from __future__ import annotations

import argparse
import atexit
import inspect
import json
import math
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import BitWidth, CollectConfig, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.errors import EdadmError
from edadm_cli.models import loading
from edadm_cli.models.families.layers import is_weighted
from edadm_cli.models.registry import ModelEntry
from edadm_cli.recipe import Recipe, load_recipe
from tests.denoisers import classes
from tests.denoisers.page import ROOT, update_table, write_table
from tests.denoisers.rows import ROWS, Row
from tests.integration.fresh_interpreter import FreshInterpreter

NOTES = ROOT / "build" / "denoisers.jsonl"
_TABLES = ("table of denoisers", "other classes of denoisers")
W8A8, W4A8 = BitWidth.parse("w8a8"), BitWidth.parse("w4a8")
LEAST_PSNR_DB = 20.0  # of an image at W8A8 against full precision of the same seed


def _versions() -> str:
    import diffusers
    import transformers

    modules = (diffusers, transformers, torch)
    return ", ".join(f"{module.__name__} {module.__version__.partition('+')[0]}" for module in modules)


@dataclass(frozen=True)
class Result:
    """What became of a row.

    Attributes:
        row: The row.
        denoiser: Class of the denoiser.
        pipeline: Class of the pipeline.
        blocks: Number of units that are blocks.
        layers: Number of layers that are quantized, and of all.
        psnr_db: An image at W8A8 against full precision of the same seed, in a fresh interpreter with plain diffusers.
        refusal: Why it does not work; `None` where it does.
        versions: The versions of the libraries.
    """

    row: Row
    denoiser: str
    pipeline: str
    blocks: int = 0
    layers: tuple[int, int] = (0, 0)
    psnr_db: float = 0.0
    refusal: str | None = None
    versions: str = field(default_factory=_versions)


def quick_recipe(iterations: int) -> Recipe:
    """The default recipe with a handful of iterations."""
    recipe = load_recipe("default")
    learn = recipe.learn.model_copy(update={"iterations": iterations, "batch_size": 2})
    ranges = recipe.ranges.model_copy(update={"num_candidates": 8})
    return recipe.model_copy(update={"learn": learn, "ranges": ranges})


def measure(row: Row, folder: Path, *, is_quick: bool = False) -> Result:
    """Take a row through the chain in `folder`.

    Args:
        row: The row.
        folder: An empty folder.
        is_quick: Whether W8A8 and the comparison of images are left out.
    """
    torch.manual_seed(0)
    pipeline = row.build()
    pipeline.save_pretrained(folder / "model")
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    result = Result(row, type(getattr(pipeline, name)).__name__, type(pipeline).__name__)
    try:
        with entry_with(row.call):
            return _chain(row, folder, result, is_quick)
    except EdadmError as error:
        return replace(result, refusal=error.message.replace(str(folder / "model"), "the model"))
    except Exception as error:  # noqa: BLE001 (a row of the table, not the end of it)
        if os.environ.get("EDADM_TABLE_TRACEBACK"):
            traceback.print_exc()
        return replace(result, refusal=f"internal error: {type(error).__name__}: {error}")


@contextmanager
def entry_with(call: dict[str, Any]) -> Iterator[None]:
    """Have models that no list knows sample with more arguments of the pipeline's call, while entered."""
    build = loading._entry_of

    def entry_of(*args: Any, **kwargs: Any) -> ModelEntry:
        return build(*args, **kwargs).model_copy(update={"call_arguments": call, "image_size": call.get("height", 16)})

    loading._entry_of = entry_of
    try:
        yield
    finally:
        loading._entry_of = build


def _chain(row: Row, folder: Path, result: Result, is_quick: bool) -> Result:
    from edadm_cli.collect import stage as collect
    from edadm_cli.export import stage as export
    from edadm_cli.reconstruct import stage as reconstruct
    from edadm_cli.select import stage as select

    run = RunFolder(folder / "run")
    pictures = example_images(folder / "images") if row.images else None
    collect.run(
        CollectConfig(
            model=str(folder / "model"),
            num_trajectories=4,
            num_steps=row.num_steps,
            batch_size=row.batch_size,
            guidance_scale=row.guidance,
            images=pictures,
            device="cpu",
        ),
        run,
    )
    select.run(SelectConfig(device="cpu"), run)
    for bits, iterations in ((W4A8, 3),) if is_quick else ((W8A8, 0), (W4A8, 3)):
        recipe = quick_recipe(iterations)
        if iterations == 0:
            recipe = recipe.model_copy(update={"learn": recipe.learn.model_copy(update={"granularity": "none"})})
        reconstruct.run(ReconstructConfig(bits=bits, recipe=recipe, device="cpu", batch_size=2), run)
        export.run(ExportConfig(bits=bits, device="cpu", parity_samples=1), run)
    model = loading.load_model(str(folder / "model"), torch.device("cpu"), torch.float32)
    blocks, counted = 0, (0, 0)
    for place, each in model.by_denoiser().items():
        part = run.open("reconstruct", str(W4A8)).within(place)
        layers = {n for n, m in each.denoiser.named_modules() if is_weighted(m)}
        plan = part.json("plan.json")
        forgotten = layers - plan["layers"].keys() - plan["kept"].keys()
        assert not forgotten, f"{len(forgotten)} layers are neither quantized nor listed, such as {min(forgotten)}"
        here = sum(unit["kind"] != "layer" for unit in part.json("units.json")["units"])
        assert here, "no unit is a block"
        blocks, counted = blocks + here, (counted[0] + len(layers & plan["layers"].keys()), counted[1] + len(layers))
    psnr = math.inf if is_quick else compare(folder, run.open("export", str(W8A8)).path, row)
    assert psnr > LEAST_PSNR_DB, f"an image at W8A8 differs from full precision: PSNR {psnr:.1f} dB"
    return Result(row, result.denoiser, result.pipeline, blocks, counted, psnr)


def example_images(folder: Path) -> Path:
    """Two pictures with masks."""
    from PIL import Image

    folder.mkdir()
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (16, 16, 48, 48))
        mask.save(folder / f"{name}.mask.png")
        mask.convert("RGB").save(folder / f"{name}.control.png")
    return folder


_COMPARISON = """
import json, signal, sys, warnings
import numpy as np
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
warnings.simplefilter("ignore")
signal.alarm(300)
full, quantized, call = sys.argv[1:]
call = json.loads(call)
images = call.pop("images", {})
from PIL import Image
for name, path in images.items():
    call[name] = Image.open(path).convert("RGB").resize((call.get("width", 16), call.get("height", 16)))
pictures = []
for folder in (full, quantized):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__ == "AllegroPipeline":
        pipeline.vae.enable_tiling()  # it decodes in no other way
    torch.manual_seed(5)  # some pipelines draw from the global generator too
    output = pipeline(**call, generator=torch.Generator().manual_seed(5), output_type="np")
    pictures.append(np.asarray(getattr(output, "images", None) if hasattr(output, "images") else output.frames))
    assert "edadm_cli.collect" not in sys.modules
print(10 * np.log10(1 / max(float(((pictures[0] - pictures[1]) ** 2).mean()), 1e-12)))
"""


@cache
def _fresh_interpreter() -> FreshInterpreter:
    """Returns a program that has imported diffusers only, and forks for each comparison of this process."""
    interpreter = FreshInterpreter()
    atexit.register(interpreter.close)
    return interpreter


def compare(folder: Path, export: Path, row: Row) -> float:
    """Returns the PSNR in dB of one image of an export against full precision, in a fresh interpreter."""
    import diffusers

    index = json.loads((folder / "model" / "model_index.json").read_text())
    parameters = inspect.signature(getattr(diffusers, index["_class_name"]).__call__).parameters
    call = {**row.call, "num_inference_steps": row.num_steps}
    if "prompt" in parameters:
        call["prompt"] = "a cat"
    if "class_labels" in parameters and parameters["class_labels"].default is inspect.Parameter.empty:
        call["class_labels"] = [3]
    if row.guidance is not None:
        call["guidance_scale"] = row.guidance
    if row.images:
        control = "one.control.png" if "image" in parameters else "one.png"
        files = {"image": "one.png", "mask_image": "one.mask.png", "control_image": control}
        call["images"] = {name: str(folder / "images" / file) for name, file in files.items() if name in parameters}
    comparing = _fresh_interpreter().start(_COMPARISON, folder / "model", export, json.dumps(call))
    output, status = comparing.stdout.read(), comparing.wait()
    comparing.close()
    assert status == 0, f"the comparison ended with status {status}; stderr has its reason"
    return float(output.split()[-1])


def markdown(results: list[Result]) -> str:
    """The table, one line per row."""
    lines = [
        "| denoiser | pipeline | as in | result | blocks | layers quantized | W8A8 against full precision |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        works = result.refusal is None
        facts = [
            f"`{result.denoiser}`",
            f"`{result.pipeline}`",
            result.row.title,
            "works" if works else f"refused: {result.refusal}".replace("|", "/"),
            str(result.blocks) if works else "",
            f"{result.layers[0]} of {result.layers[1]}" if works else "",
            f"{result.psnr_db:.1f} dB" if works else "",
        ]
        lines.append("| " + " | ".join(facts) + " |")
    return "\n".join(lines) + "\n"


def run_rows(rows: tuple[Row, ...], notes: Path | None = None, jobs: int = 1) -> list[Result]:
    """Measures rows, and prints each line as soon as it is there.

    Args:
        rows: The rows.
        notes: A file with one finished row per line. Rows that it holds are not measured again.
        jobs: The number of processes.
    """
    results = {} if notes is None or not notes.is_file() else _read_notes(notes)
    missing = [row for row in rows if row.title not in results]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        for future in as_completed([pool.submit(_measured, row.title) for row in missing]):
            result = future.result()
            results[result.row.title] = result
            if notes is not None:
                notes.parent.mkdir(parents=True, exist_ok=True)
                facts = asdict(result) | {"row": result.row.title, "code": code_sha256()}
                with notes.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(facts) + "\n")
            print(markdown([result]).splitlines()[-1], flush=True)
    return [results[row.title] for row in rows]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _measured(title: str) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="edadm-table-"))
    try:
        return measure(next(row for row in ROWS if row.title == title), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_notes(notes: Path) -> dict[str, Result]:
    """Returns the finished rows of a file by their titles, without those of other code."""
    rows = {row.title: row for row in ROWS}
    facts = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    code = code_sha256()
    return {
        fact["row"]: Result(**{**fact, "row": rows[fact["row"]], "layers": tuple(fact["layers"])})
        for fact in facts
        if fact.pop("code", None) == code and fact["row"] in rows
    }


@cache
def code_sha256() -> str:
    """Returns a hash of the package and of the builders of the rows."""
    digest = sha256()
    for folder in (ROOT / "edadm_cli", ROOT / "tests" / "denoisers"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_tables(results: list[Result]) -> None:
    """Write the table of the rows, and that of the classes that no row measures, into docs/models.md."""
    others = classes.markdown({result.denoiser for result in results})
    versions = " and ".join(sorted({result.versions for result in results}))
    measured = f"{markdown(results)}\nThese rows are of {versions}, in float32 on a CPU.\n"
    for name, table in zip(_TABLES, (measured, others), strict=True):
        write_table(name, table)


def main() -> None:
    """Write the table, or print some rows of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None, help="names of builders")
    parser.add_argument("--engine", action="store_true", help="the table of the OpenVINO engine instead")
    parser.add_argument("--update", action="store_true", help="put the rows of --only into docs/models.md")
    parser.add_argument("--notes", type=Path, default=None, help="file of the rows that are finished")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, of one thread each")
    options = parser.parse_args()
    if options.engine:
        from tests.denoisers import engines

        notes = options.notes or engines.NOTES
        return engines.write_engine_table(options.only, options.update, notes, options.jobs)
    if options.only is not None:
        results = run_rows(tuple(row for row in ROWS if row.build.__name__ in options.only), jobs=options.jobs)
        for result in results if options.update else ():
            update_table(_TABLES[0], [row.title for row in ROWS], markdown([result]).splitlines()[-1])
        return
    notes = options.notes or NOTES
    results = run_rows(ROWS, notes, options.jobs)
    write_tables(results)
    notes.unlink()


if __name__ == "__main__":
    main()
