"""A loaded pipeline, which sampling and the stages use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from edadm_cli.artifacts import ModelRef
from edadm_cli.errors import UsageError
from edadm_cli.models.placement import Placement
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
        further: Components that are quantized too, because they denoise at other timesteps or in the other branch of
            guidance.
        remarks: Assumptions about it and ignored parts, one sentence each, for the user to read.
        placement: Where its weights are while it samples; see `edadm_cli/models/placement.py`.
    """

    ref: ModelRef
    entry: ModelEntry
    pipeline: DiffusionPipeline
    denoiser_name: str
    folder: Path | None
    remarks: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    placement: Placement = "memory"

    def require_one_denoiser(self, purpose: str, hint: str | None = None) -> None:
        """Refuses a pipeline with several denoisers.

        Args:
            purpose: The subject of the sentence that takes one denoiser.
            hint: What to do instead.

        Raises:
            UsageError: There are several.
        """
        if self.further:
            names = ", ".join(f"'{name}'" for name in (self.denoiser_name, *self.further))
            raise UsageError(
                f"{self.ref.id} has {1 + len(self.further)} denoisers ({names}), and {purpose} takes one.", hint=hint
            )

    @property
    def denoiser(self) -> nn.Module:
        """The network that is quantized."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    def by_denoiser(self) -> dict[str, LoadedModel]:
        """Returns this model once per denoiser, each with another `denoiser`.

        The keys are the denoisers' folders within an artifact: `""`, the artifact's own folder, for the first one, and
        the component's name for every further one.
        """
        return {"": self} | {name: replace(self, denoiser_name=name, further=()) for name in self.further}
