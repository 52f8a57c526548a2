"""Decides the open choices of a reconstruction, without loading the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from edadm_cli.artifacts import Artifact, BuildSpec, RunFolder
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.registry import known_models
from edadm_cli.processes import Processes
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """A configuration whose open choices are all decided.

    Attributes:
        config: The configuration.
        run: The run folder.
        selection: The calibration set.
        sensitivity: The measurement by which bits are assigned, if they are.
        batch_size: Samples per forward of the denoiser.
        hyperparameters: The numbers of the optimization.
        processes: The processes that share the work.
        assigned_bits: The weight bits of each layer of all denoisers, once they are assigned by sensitivity.
    """

    config: ReconstructConfig
    run: RunFolder
    selection: Artifact
    sensitivity: Artifact | None
    batch_size: int
    hyperparameters: Hyperparameters
    processes: Processes
    assigned_bits: dict[str, int] = field(default_factory=dict, compare=False)

    def build_spec(self) -> BuildSpec:
        """Returns the description of the artifact, whose fields are its identity."""
        config = self.config
        fields = {**config.identity_fields(), "batch_size": self.batch_size}
        fields["recipe"] = {k: v for k, v in fields["recipe"].items() if k not in ("description", "collect", "select")}
        fields.pop("matmul", None)
        if config.matmul is not None and config.matmul != self.usual_matmul:  # what is usual is not in the identity
            fields["matmul"] = config.matmul
        fields["hyperparameters"] = self.hyperparameters.identity_fields()
        model = self.selection.manifest.model
        parents = (self.selection,) if self.sensitivity is None else (self.selection, self.sensitivity)
        return BuildSpec("reconstruct", str(config.bits), fields, config.seed, parents, model)

    @cached_property
    def device(self) -> torch.device:
        """The device of this process."""
        from edadm_cli.models.loading import resolve_device

        return resolve_device(self.processes.device_name(self.config.device))

    @property
    def usual_matmul(self) -> str:
        """How float32 numbers are multiplied if the user does not choose: `tf32` on a GPU, else `float32`."""
        return "tf32" if self.device.type == "cuda" else "float32"

    @property
    def matmul(self) -> str:
        """The way in which float32 numbers are multiplied: `float32` or `tf32`."""
        return self.config.matmul or self.usual_matmul


def resolve_task(config: ReconstructConfig, run: RunFolder, processes: Processes) -> Task:
    """Decides what the configuration leaves open, without loading the model."""
    selection = run.open("select")
    entry = known_models().get(selection.manifest.model.id)
    hyperparameters = resolve(config.recipe.learn, entry.paper if entry else None, config.bits)
    if hyperparameters.batch_size < processes.count:
        raise UsageError(
            f"A step takes {hyperparameters.batch_size} rows, which {processes.count} processes cannot share.",
            hint="a larger batch_size in the recipe, or fewer processes",
        )
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = CollectedRun.open(run).entry.batch_size
    sensitivity = run.open("sensitivity") if config.bits.is_mixed else None
    task = Task(config, run, selection, sensitivity, batch_size, hyperparameters, processes)
    if config.matmul == "tf32" and task.device.type != "cuda":
        raise UsageError("--matmul tf32 needs an NVIDIA GPU, but this reconstruction runs on the CPU.")
    return task
