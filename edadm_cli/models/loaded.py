"""A pipeline in memory, as loading gives it and sampling takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from edadm_cli.artifacts import ModelRef
from edadm_cli.models.registry import ModelEntry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class LoadedModel:
    """A pipeline in memory, ready to sample.

    Attributes:
        ref: Its identity: id, revision and the fingerprint of its files.
        entry: Its defaults: steps, guidance, sampler.
        pipeline: The diffusers pipeline, in eval mode on its device, without progress bars or safety checker.
        denoiser_name: Component that is quantized: `unet` or `transformer`.
        folder: The folder of its files; `None` for a pipeline that was built or converted in memory.
        remarks: What was assumed about it or left aside, one sentence each, for the user to read.
    """

    ref: ModelRef
    entry: ModelEntry
    pipeline: DiffusionPipeline
    denoiser_name: str
    folder: Path | None
    remarks: tuple[str, ...] = ()

    @property
    def denoiser(self) -> nn.Module:
        """The network that is quantized."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module
