"""Resolves the configuration of an evaluation: the images that are sampled, and the pipelines that sample them.

Nothing here imports a library that computes before a pipeline is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.artifacts import Artifact, ModelRef, RunFolder
from edadm_cli.artifacts.store import is_artifact_name
from edadm_cli.config import EvaluateConfig
from edadm_cli.errors import UsageError
from edadm_cli.integrations.cache_settings import StepCache
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.pipeline_calls.prompts import read_prompts
from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed
from edadm_cli.models.registry import ModelEntry
from edadm_cli.models.shipped import shipped_prompts

if TYPE_CHECKING:
    import torch

    from edadm_cli.models.loaded import LoadedModel


@dataclass(frozen=True)
class SamplingPlan:
    """The images to sample, at either precision.

    Args:
        seeds: One seed per image.
        prompts: One prompt per image; `None` for models without prompts.
        num_steps: T, the number of sampler steps.
        guidance_scale: Scale of classifier-free guidance; `None` for models without guidance.
        batch_size: Images per batch; the last batch may have fewer.
    """

    seeds: tuple[int, ...]
    prompts: tuple[str, ...] | None
    num_steps: int
    guidance_scale: float | None
    batch_size: int

    def __len__(self) -> int:
        return len(self.seeds)

    def batches(self) -> Iterator[tuple[int, slice]]:
        """Yields the number of each batch and the range of its images."""
        for start in range(0, len(self), self.batch_size):
            yield start // self.batch_size, slice(start, min(start + self.batch_size, len(self)))


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation whose settings are all decided, from its configuration and from how the run was collected.

    Args:
        config: The configuration.
        run: The run folder with the artifacts.
        export: The quantized pipeline.
        collected: The full-precision pipeline that it was made from.
        sampling: The images, at either precision.
    """

    config: EvaluateConfig
    run: RunFolder
    export: Artifact
    collected: CollectedRun
    sampling: SamplingPlan

    @property
    def model(self) -> ModelRef:
        """Returns the model that was quantized."""
        return self.collected.model

    @property
    def entry(self) -> ModelEntry:
        """Returns the model's own defaults."""
        return self.collected.entry

    @property
    def dtype(self) -> str:
        """Returns the name of the element type that both pipelines compute in, as collected."""
        return self.collected.sampling.dtype

    def identity_fields(self) -> dict[str, Any]:
        """Returns everything that decides the images of a pipeline, as plain JSON values."""
        prompts = self.sampling.prompts
        return {
            "num_images": len(self.sampling),
            "batch_size": self.sampling.batch_size,
            "num_steps": self.sampling.num_steps,
            "guidance_scale": self.sampling.guidance_scale,
            "dtype": self.dtype,
            "eta": self.entry.eta,
            "pipeline_class": self.entry.pipeline_class,
            "scheduler_class": self.entry.scheduler_class,
            "scheduler_config": self.entry.scheduler_config,
            "prompts_sha256": None if prompts is None else sha256("\n".join(prompts).encode()).hexdigest(),
        }

    def load_full_precision(self) -> LoadedModel:
        """Loads the full-precision pipeline of the run.

        Raises:
            InputError: Its files are missing or have changed since the run was collected.
        """
        return self.collected.load(self.device, self.collected.dtype)

    def load_quantized(self) -> LoadedModel:
        """Loads the exported pipeline, on an engine if one is named."""
        from edadm_cli.engines.files import load_on_engine
        from edadm_cli.engines.registry import engine
        from edadm_cli.models.loading import load_model
        from edadm_cli.progress import SilentReporter

        device, dtype = self.device, self.collected.dtype
        if self.config.engine is not None:
            return load_on_engine(self.run, self.export, engine(self.config.engine), device, dtype, SilentReporter())
        return load_model(str(self.export.path), device, dtype, self.entry)

    def load_sampler(self) -> LoadedModel:
        """Loads the exported pipeline, with a step cache if one is named.

        Raises:
            UsageError: The denoiser or its engine cannot be cached.
        """
        model = self.load_quantized()
        if self.config.cache is not None:
            from edadm_cli.integrations.caching import enable_cache

            enable_cache(model, self.config.cache)
        return model

    @property
    def device(self) -> torch.device:
        """Returns the device of the pipelines and the feature extractors."""
        from edadm_cli.models.loading import resolve_device

        return resolve_device(self.config.device)


def resolve(config: EvaluateConfig, run: RunFolder) -> EvaluationRequest:
    """Decides everything that a configuration leaves open, and checks it.

    Raises:
        InputError: The export or an ancestor of it is missing or broken, or the prompt file is not usable.
        UsageError: Prompts or guidance are requested of a model that has none, or there is no such step cache.
    """
    if config.cache is not None:
        StepCache.parse(config.cache)
    if not is_artifact_name(config.name):
        require_machine(config)  # no engine has such a name
    export = run.open("export", str(config.bits))
    collected = CollectedRun.open(run)
    entry = collected.entry
    if config.guidance_scale is not None and collected.guidance_scale is None:
        raise UsageError(f"{entry.name} has no guidance, so --guidance-scale has no meaning for it.")
    prompts = _resolve_prompts(entry, collected.prompts, config.prompts, config.num_images, config.seed)
    sampling = SamplingPlan(
        seeds=tuple(image_seed(config.seed, index, EVALUATION) for index in range(config.num_images)),
        prompts=prompts,
        num_steps=config.num_steps or collected.num_steps,
        guidance_scale=collected.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        batch_size=min(config.batch_size, config.num_images),
    )
    return EvaluationRequest(config, run, export, collected, sampling)


def _resolve_prompts(
    entry: ModelEntry, collected: list[str] | None, path: Path | None, num_images: int, seed: int
) -> tuple[str, ...] | None:
    """Returns the prompts of a file, else the model's own, else the collected ones, repeated if too few."""
    if collected is None:
        if path is not None:
            raise UsageError(f"{entry.name} takes no prompts, so --prompts has no meaning for it.")
        return None
    if path is None and entry.prompts is not None:
        return tuple(shipped_prompts(entry.prompts, num_images, seed))
    lines = collected if path is None else read_prompts(path)
    return tuple(lines[index % len(lines)] for index in range(num_images))


def require_machine(config: EvaluateConfig) -> None:
    """Checks that the pipelines can run here, before anything is sampled.

    Raises:
        UsageError: There is no such engine, or it takes no step cache.
        MachineError: There is no such device, or the engine cannot run on it.
    """
    from edadm_cli.engines.base import ONE_GRAPH, FileEngine
    from edadm_cli.engines.registry import engine
    from edadm_cli.models.loading import resolve_device

    device = resolve_device(config.device)
    if config.engine is not None:
        chosen = engine(config.engine)
        chosen.require(device)
        if config.cache is not None and isinstance(chosen, FileEngine):
            raise UsageError(ONE_GRAPH)
