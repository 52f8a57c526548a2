"""Command lines that build a run again, or that build a missing artifact."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from edadm_cli.artifacts import BenchResult, ExportFacts, Manifest, Payload, recipe_name
from edadm_cli.report.contents import BY_BITS, Part, RunContents
from edadm_cli.stage_config import SIZE_ARGUMENTS

_FLAGS: dict[str, tuple[str, ...]] = {
    "collect": ("num_trajectories", "num_steps", "guidance_scale", "batch_size", "feature_batch", "dtype"),
    "select": ("strategy", "num_samples", "density_radius", "variety_weight"),
    "sensitivity": ("weight_bits", "activation_bits", "num_samples", "num_images", "batch_size"),
    "reconstruct": ("batch_size",),
    "export": ("parity_samples", "text_encoders"),
    "evaluate": ("num_images", "batch_size", "num_steps", "guidance_scale"),
    "bench": ("engine", "device", "dtype", "threads"),
}
"""Settings of each stage that are flags of the same name."""


def missing_command(contents: RunContents, kind: str, bits: str | None = None) -> str:
    """Returns the command that builds a stage's artifact."""
    words = ["edadm", kind]
    if kind == "collect":
        words += ["--model", contents.model.id]
    if kind in BY_BITS:
        words += ["--bits", bits or "w4a8"]
    return shlex.join(words)


def repeating_commands(contents: RunContents) -> list[str]:
    """Returns the commands that build every artifact of the run again, with all settings."""
    return [shlex.join(_words(part)) for part in contents.parts()]


def _words(part: Part[Payload]) -> Iterator[str]:
    manifest: Manifest = part.artifact.manifest
    yield from ("edadm", manifest.kind)
    if manifest.kind == "collect":
        yield from ("--model", manifest.model.id)
    if manifest.kind in BY_BITS:
        yield from ("--bits", part.artifact.path.name)
    if isinstance(part.facts, BenchResult):
        yield from _words_of_bench(Part(part.artifact, part.facts))
    if isinstance(part.facts, ExportFacts):
        for lora in part.facts.lora:
            yield from ("--lora", f"{lora.file}:{lora.weight:g}")
    if manifest.kind in ("sensitivity", "reconstruct"):
        yield from ("--recipe", recipe_name(part.artifact))
    for name in _FLAGS[manifest.kind]:
        value = manifest.config.get(name)
        if value is not None:
            yield f"--{name.replace('_', '-')}"
            yield _setting(value)
    scheduler = manifest.config.get("scheduler_config")
    if manifest.kind == "collect" and isinstance(scheduler, dict) and "prediction_type" in scheduler:
        yield from ("--prediction-type", str(scheduler["prediction_type"]))
    for name, value in (manifest.config.get("call_arguments") or {}).items():
        if manifest.kind == "collect" and name in SIZE_ARGUMENTS:
            yield from (f"--{name.replace('_', '-')}", str(value))
    if manifest.seed:
        yield from ("--seed", str(manifest.seed))


def _setting(value: Any) -> str:
    """Returns a value in the form of its flag; several values are separated by commas."""
    if isinstance(value, list):
        return ",".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words_of_bench(part: Part[BenchResult]) -> Iterator[str]:
    config = part.config
    if not part.artifact.manifest.parents:
        yield from ("--model", part.artifact.manifest.model.id)
    yield from ("--bits", ",".join(part.facts.bits))
    yield from ("--batch-sizes", ",".join(str(size) for size in config.get("batch_sizes", [1])))
    if config.get("size"):
        yield from ("--size", "x".join(str(side) for side in config["size"]))
    if config.get("against"):
        yield from ("--against", ",".join(config["against"]))
    if config.get("compiled") is False:
        yield "--no-compiled"
    if config.get("pipeline"):
        yield "--pipeline"
