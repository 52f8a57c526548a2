"""Command lines that build a run again, or that build a missing artifact."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from edadm_cli.artifacts import BenchResult, Evaluation, ExportFacts, Manifest, Payload, recipe_name
from edadm_cli.config import EARLIER_DENSITY_QUANTILE, EvaluateConfig
from edadm_cli.report.contents import BY_BITS, Part, RunContents
from edadm_cli.stage_config import SIZE_ARGUMENTS

_FLAGS: dict[str, tuple[str, ...]] = {
    "collect": ("num_trajectories", "num_steps", "guidance_scale", "batch_size", "feature_batch", "dtype"),
    "select": ("strategy", "num_samples", "density_radius", "density_quantile", "variety_weight"),
    "sensitivity": ("weight_bits", "activation_bits", "num_samples", "num_images", "batch_size"),
    "reconstruct": ("batch_size", "units", "matmul"),
    "export": ("parity_samples", "text_encoders"),
    "evaluate": (
        *("engine", "features", "cache", "num_images", "batch_size", "num_steps", "guidance_scale", "metrics"),
        *("clip_model", "clip_pretrained"),
    ),
    "bench": ("engine", "device", "dtype", "threads", "attention", "cache"),
}
"""Settings of each stage that are flags of the same name."""
_USUAL = {name: EvaluateConfig.model_fields[name].default for name in ("clip_model", "clip_pretrained")}
"""Settings that are shown only if they differ from these."""
_HASH = re.compile("[0-9a-f]{64}")
"""What a manifest holds in place of a file of weights, which no flag takes."""


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
    yield from _words_of_inputs(part)
    for name in _FLAGS[manifest.kind]:
        value = manifest.config.get(name)
        is_file = name == "clip_pretrained" and _HASH.fullmatch(str(value)) is not None
        if value not in (None, [], _USUAL.get(name)) and not is_file:
            for text in map(_setting, value) if name == "units" else (_setting(value),):  # patterns may have commas
                yield from (_flag(name), text)
    if manifest.kind == "collect":
        yield from _words_of_sampling(manifest)
    if manifest.seed:
        yield from ("--seed", str(manifest.seed))


def _words_of_inputs(part: Part[Payload]) -> Iterator[str]:
    """Returns the flags whose values are not in the artifact's configuration under the names of the flags."""
    manifest: Manifest = part.artifact.manifest
    if manifest.kind == "collect":
        yield from ("--model", manifest.model.id)
    if manifest.kind in BY_BITS:
        yield from ("--bits", part.facts.bits if isinstance(part.facts, Evaluation) else part.artifact.path.name)
    if isinstance(part.facts, BenchResult):
        yield from _words_of_bench(Part(part.artifact, part.facts))
    if isinstance(part.facts, ExportFacts):
        for lora in part.facts.lora:
            yield from ("--lora", f"{lora.file}:{_setting(lora.weight)}")
    if manifest.kind in ("sensitivity", "reconstruct"):
        yield from ("--recipe", recipe_name(part.artifact))
    if manifest.kind == "select" and _has_earlier_quantile(manifest):
        yield from ("--density-quantile", _setting(EARLIER_DENSITY_QUANTILE))


def _words_of_sampling(manifest: Manifest) -> Iterator[str]:
    """Returns the flags of `collect` for the scheduler and for the size of what is sampled."""
    scheduler = manifest.config.get("scheduler_config")
    if isinstance(scheduler, dict) and "prediction_type" in scheduler:
        yield from ("--prediction-type", str(scheduler["prediction_type"]))
    for name, value in (manifest.config.get("call_arguments") or {}).items():
        if name in SIZE_ARGUMENTS:
            yield from (_flag(name), str(value))


def _flag(name: str) -> str:
    """Returns the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _setting(value: Any) -> str:
    """Returns a value in the form of its flag; several values are separated by commas."""
    if isinstance(value, list):
        return ",".join(map(_setting, value))
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _has_earlier_quantile(manifest: Manifest) -> bool:
    """Returns whether a selection has the quantile that is left out of its settings."""
    config = manifest.config
    return (
        config.get("strategy") == "tdac" and config.get("density_radius") is None and "density_quantile" not in config
    )


def _words_of_bench(part: Part[BenchResult]) -> Iterator[str]:
    config = part.config
    if not part.artifact.manifest.parents:
        yield from ("--model", part.artifact.manifest.model.id)
    if config.get("recipe"):
        yield from ("--recipe", recipe_name(part.artifact))
    yield from ("--bits", ",".join(part.facts.bits))
    yield from ("--batch-sizes", ",".join(str(size) for size in config.get("batch_sizes", [1])))
    if config.get("size"):
        yield from ("--size", "x".join(str(side) for side in config["size"]))
    if config.get("against"):
        yield from ("--against", ",".join(config["against"]))
    if config.get("compiled") is False:
        yield "--no-compiled"
    yield from (f"--{name}" for name in ("autotune", "pipeline") if config.get(name))
