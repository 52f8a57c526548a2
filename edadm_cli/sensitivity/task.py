"""Decides the open choices of a sensitivity measurement, without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edadm_cli.artifacts import Artifact, BuildSpec, RunFolder
from edadm_cli.config import SensitivityConfig
from edadm_cli.models.collected import CollectedRun

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """A configuration whose open choices are all decided.

    Attributes:
        config: The configuration.
        collected: The run.
        selection: The calibration sets.
        batch_size: Samples per forward of a denoiser.
    """

    config: SensitivityConfig
    collected: CollectedRun
    selection: Artifact
    batch_size: int

    @cached_property
    def device(self) -> torch.device:
        """The device that computes."""
        from edadm_cli.models.loading import resolve_device

        return resolve_device(self.config.device)

    def build_spec(self) -> BuildSpec:
        """Returns the description of the artifact."""
        fields = {**self.config.identity_fields(), "batch_size": self.batch_size}
        other = {"description", "collect", "select", "learn"}
        fields["recipe"] = {key: value for key, value in fields["recipe"].items() if key not in other}
        model = self.selection.manifest.model
        return BuildSpec("sensitivity", None, fields, self.config.seed, (self.selection,), model)


def resolve_task(config: SensitivityConfig, run_folder: RunFolder) -> Task:
    """Decides what the configuration leaves open, without loading the model."""
    collected = CollectedRun.open(run_folder)
    selection = run_folder.open("select")
    batch_size = config.batch_size or collected.entry.batch_size
    return Task(config, collected, selection, batch_size)
