"""Resolves the configuration of an evaluation: the images that are sampled, and the pipelines that sample them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from edadm_cli.artifacts import Artifact, ModelRef, RunFolder
from edadm_cli.config import EvaluateConfig
from edadm_cli.engines.base import ONE_GRAPH, FileEngine
from edadm_cli.engines.files import load_on_engine
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import UsageError
from edadm_cli.evaluate.images import SamplingPlan
from edadm_cli.integrations.caching import StepCache, enable_cache
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.prompts import read_prompts
from edadm_cli.models.pipeline_calls.sampling import EVALUATION, image_seed
from edadm_cli.models.registry import ModelEntry
from edadm_cli.models.shipped import shipped_prompts
from edadm_cli.progress import SilentReporter


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
        """The model that was quantized."""
        return self.collected.model

    @property
    def entry(self) -> ModelEntry:
        """The model's own defaults."""
        return self.collected.entry

    @property
    def dtype(self) -> str:
        """Name of the element type that both pipelines compute in, as collected."""
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
        if self.config.engine is not None:
            engine = engine_of(self.config.engine)
            return load_on_engine(self.run, self.export, engine, self.device, self.collected.dtype, SilentReporter())
        return load_model(str(self.export.path), self.device, self.collected.dtype, self.entry)

    def load_sampler(self) -> LoadedModel:
        """Loads the exported pipeline, with a step cache if one is named.

        Raises:
            UsageError: The denoiser or its engine cannot be cached.
        """
        model = self.load_quantized()
        if self.config.cache is not None:
            enable_cache(model, self.config.cache)
        return model

    @property
    def device(self) -> torch.device:
        """The device of the pipelines and the feature extractors."""
        return resolve_device(self.config.device)


def resolve(config: EvaluateConfig, run: RunFolder) -> EvaluationRequest:
    """Decides everything that a configuration leaves open, and checks it.

    Raises:
        InputError: The export or an ancestor of it is missing or broken, or the prompt file is not usable.
        UsageError: Prompts or guidance are requested of a model that has none, or a cache of an engine that takes none.
        MachineError: There is no such device.
    """
    device = resolve_device(config.device)
    engine = None if config.engine is None else engine_of(config.engine)
    if engine is not None:
        engine.require(device)
    if config.cache is not None:
        StepCache.parse(config.cache)
        if isinstance(engine, FileEngine):
            raise UsageError(ONE_GRAPH)
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
