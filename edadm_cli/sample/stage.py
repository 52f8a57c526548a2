"""`edadm sample`: samples images from an export into PNG files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edadm_cli.artifacts import Artifact, RunFolder, SampleRecord, explained_os_errors, shared_keys
from edadm_cli.artifacts.files import atomic_path
from edadm_cli.config import SampleConfig
from edadm_cli.engines.files import load_on_engine
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.models.registry import ModelEntry
from edadm_cli.models.shipped import shipped_prompts
from edadm_cli.progress import Reporter, SilentReporter

FOLDER = "samples"
FACTS_KEY = "edadm"
"""Key of the text in a PNG file that records the settings of the image."""
_SLUG_CHARACTERS = 48
_HASH_CHARACTERS = 8
_PLAIN_PROMPT = re.compile(r"^[a-z0-9]+( [a-z0-9]+)*$")
_PROBE_STEPS = 2


@dataclass(frozen=True)
class Picture:
    """Everything that decides one image."""

    seed: int
    prompt: str | None
    num_steps: int
    guidance_scale: float | None
    arithmetic: str
    export: str
    engine: str | None = None

    @property
    def file(self) -> str:
        """Returns the name of its file: the seed, the prompt, and what computed it; each prompt has its own name.

        A prompt of a few plain words is part of the name. Any other prompt is shortened to the characters that a file
        name allows, followed by the beginning of a hash of the whole prompt.
        """
        computed = self.engine or ("integer" if self.arithmetic == "integer" else "")
        parts = [f"{self.seed:06d}", _slug(self.prompt or ""), computed]
        return "-".join(part for part in parts if part) + ".png"

    def facts(self) -> str:
        """Returns the text that is written into the file, by which a later run recognizes the image."""
        return json.dumps(self._known(), sort_keys=True)

    def _known(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "engine" or value is not None}

    def differences(self, facts: str | None) -> str:
        """Returns in words how the facts in a file differ from those of this image."""
        try:
            held = json.loads(facts or "")
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict):
            return "a file that edadm did not write"
        known = self._known()
        names = [name for name in sorted(held.keys() | known.keys()) if held.get(name) != known.get(name)]
        parts = [f"its {name.replace('_', ' ')} is {held.get(name)!r} and not {known.get(name)!r}" for name in names]
        return f"another image: {', '.join(parts)}"


def _slug(prompt: str) -> str:
    if not prompt:
        return ""
    text = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_CHARACTERS].rstrip("-")
    if _PLAIN_PROMPT.match(prompt) and len(prompt) <= _SLUG_CHARACTERS:
        return text
    digest = sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARACTERS]
    return f"{text}-{digest}" if text else digest


@dataclass(frozen=True)
class _Task:
    """The configuration with every open setting decided."""

    config: SampleConfig
    run: RunFolder
    export: Artifact
    entry: ModelEntry
    dtype: torch.dtype
    pictures: list[Picture]


def run(
    config: SampleConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SampleRecord:
    """Samples images with the seeds `seed, seed + 1, ...` into `samples/<bits>/`; existing images are kept.

    Raises:
        InputError: The export is missing or broken, or a file of another image has the same name.
        UsageError: Prompts are given for a model that takes none, or a scale for a model without guidance.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    task = prepare(config, run_folder)
    folder = _folder(config, run_folder)
    missing = [picture for picture in task.pictures if force or not _is_there(folder, picture)]
    if missing:
        _write_pictures(task, missing, folder, reporter)
    shared = shared_keys(
        run_folder.root, task.export, up_to_date=not missing, started=start, warnings=reporter.warnings
    )
    return SampleRecord(
        **{**shared, "artifact": str(folder)},
        images=tuple(str(folder / picture.file) for picture in task.pictures),
    )


def finished(config: SampleConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the folder of the images, with the export's manifest, if every image exists already.

    Raises:
        InputError: The export is missing or broken, or a file of another image has the same name.
    """
    folder = _folder(config, run_folder)
    if not folder.is_dir():
        return None
    task = prepare(config, run_folder)
    there = [_is_there(folder, picture) for picture in task.pictures]
    return Artifact(folder, task.export.manifest) if all(there) else None


def artifact_name(config: SampleConfig) -> str:
    """Returns the name of the folder within `samples/`."""
    return str(config.bits)


def _folder(config: SampleConfig, run: RunFolder) -> Path:
    return run.root / FOLDER / str(config.bits)


def prepare(config: SampleConfig, run: RunFolder) -> _Task:
    """Decides seed, prompt and sampler of each image."""
    if config.engine is not None:
        engine_of(config.engine).require(resolve_device(config.device))
        if config.arithmetic == "integer":
            raise UsageError("--arithmetic integer runs the engine 'reference', so --engine cannot name another one.")
    export = run.open("export", str(config.bits))
    collected = CollectedRun.open(run)
    entry = collected.entry
    if config.guidance_scale is not None and collected.guidance_scale is None:
        raise UsageError(f"{entry.name} has no guidance, so --guidance-scale has no meaning for it.")
    prompts = _prompts(config, entry, collected.prompts)
    pictures = [
        Picture(
            seed=config.seed + index,
            prompt=None if prompts is None else prompts[index % len(prompts)],
            num_steps=config.num_steps or collected.num_steps,
            guidance_scale=collected.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            arithmetic=config.arithmetic,
            export=export.identity,
            engine=config.engine,
        )
        for index in range(config.num_images)
    ]
    return _Task(config, run, export, entry, collected.dtype, pictures)


def _prompts(config: SampleConfig, entry: ModelEntry, collected: list[str] | None) -> Sequence[str] | None:
    """Returns the given prompts, else the model's own, else those that the run was collected with."""
    if collected is None:
        if config.prompt:
            raise UsageError(f"{entry.name} takes no prompts, so --prompt has no meaning for it.")
        return None
    if config.prompt:
        return config.prompt
    if entry.prompts is not None:
        return shipped_prompts(entry.prompts, config.num_images, config.seed)
    return collected


def load(task: _Task, reporter: Reporter) -> LoadedModel:
    """Loads the export, on an engine if one is named."""
    device = resolve_device(task.config.device)
    if task.config.engine is not None:
        return load_on_engine(task.run, task.export, engine_of(task.config.engine), device, task.dtype, reporter)
    model = load_model(str(task.export.path), device, task.dtype, task.entry)
    is_integer = task.config.arithmetic == "integer"
    counts = [use_arithmetic(each.denoiser, "integer") for each in model.by_denoiser().values() if is_integer]
    if is_integer and not sum(counts):
        raise InputError(f"{task.export.path} has no quantized layer, so there is nothing to compute in integers.")
    return model


def sample_pictures(model: LoadedModel, pictures: Sequence[Picture]) -> Samples:
    """Samples images that share steps and guidance."""
    first = pictures[0]
    prompts = None if first.prompt is None else [picture.prompt or "" for picture in pictures]
    samples = sample(
        model,
        seeds=[picture.seed for picture in pictures],
        prompts=prompts,
        num_steps=first.num_steps,
        guidance_scale=first.guidance_scale,
    )
    if not bool(torch.isfinite(samples.latents).all()):
        raise InputError(
            f"{model.ref.id} is broken: an image comes from values that are not finite.",
            hint="edadm reconstruct, with more bits or another recipe",
        )
    return samples


def _is_there(folder: Path, picture: Picture) -> bool:
    """Returns whether an image is on disk already.

    Raises:
        InputError: A file with its name holds something else.
    """
    path = folder / picture.file
    if not path.is_file():
        return False
    try:
        with Image.open(path) as file:
            facts = file.info.get(FACTS_KEY)
    except Exception:  # noqa: BLE001 - each of Pillow's decoders raises other kinds of errors
        facts = None
    if facts == picture.facts():
        return True
    raise InputError(f"{path} is {picture.differences(facts)}.", hint="add --force to replace it")


def _write_pictures(task: _Task, pictures: list[Picture], folder: Path, reporter: Reporter) -> None:
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    model = load(task, reporter)
    size = task.config.batch_size
    with reporter.task(f"Sampling {task.config.bits}", len(pictures)) as advance:
        for start in range(0, len(pictures), size):
            batch = pictures[start : start + size]
            for picture, image in zip(batch, sample_pictures(model, batch).images, strict=True):
                _save_png(folder / picture.file, image, picture.facts())
            advance(len(batch))


def _save_png(path: Path, image: torch.Tensor, facts: str) -> None:
    array = image.permute(1, 2, 0).numpy()  # [H, W, C]
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    info = PngInfo()
    info.add_itxt(FACTS_KEY, facts)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
