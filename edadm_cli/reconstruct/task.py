"""Prepares a reconstruction: decides its open choices, loads its denoiser and plans its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from edadm_cli.artifacts import Artifact, BuildSpec, RunFolder, Sensitivity
from edadm_cli.calibrate.bit_budget import layer_costs, spend_budget
from edadm_cli.calibrate.planning import layer_rule, plan_network
from edadm_cli.config import ReconstructConfig
from edadm_cli.errors import UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loading import resolve_device
from edadm_cli.models.registry import known_models
from edadm_cli.models.repeatable import repeatable_convolutions
from edadm_cli.models.stored import is_stored
from edadm_cli.models.units import Trace, Unit, trace, units
from edadm_cli.processes import Processes
from edadm_cli.quant.plan import QuantizationPlan, name_within
from edadm_cli.recipe import Recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve
from edadm_cli.reconstruct.network import SwitchableNetwork


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
        device: The device of this process.
        processes: The processes that share the work.
        assigned_bits: The weight bits of each layer of all denoisers, once they are assigned by sensitivity.
    """

    config: ReconstructConfig
    run: RunFolder
    selection: Artifact
    sensitivity: Artifact | None
    batch_size: int
    hyperparameters: Hyperparameters
    device: torch.device
    processes: Processes
    assigned_bits: dict[str, int] = field(default_factory=dict, compare=False)

    def build_spec(self) -> BuildSpec:
        """Returns the description of the artifact, whose fields are its identity."""
        config = self.config
        fields = {**config.identity_fields(), "batch_size": self.batch_size}
        fields["recipe"] = {k: v for k, v in fields["recipe"].items() if k not in ("description", "collect", "select")}
        fields.pop("matmul", None)
        if self.matmul != _usual_matmul(self.device):  # what a device usually does is not part of the identity
            fields["matmul"] = self.matmul
        fields["hyperparameters"] = self.hyperparameters.identity_fields()
        model = self.selection.manifest.model
        parents = (self.selection,) if self.sensitivity is None else (self.selection, self.sensitivity)
        return BuildSpec("reconstruct", str(config.bits), fields, config.seed, parents, model)

    @property
    def matmul(self) -> str:
        """The way in which float32 numbers are multiplied: `float32` or `tf32`."""
        return self.config.matmul or _usual_matmul(self.device)

    def recipe(self, place: str, denoiser: nn.Module, traced: Trace) -> Recipe:
        """Returns the recipe of a denoiser; if bits are assigned by sensitivity, each layer's rule gives it its bits.

        Args:
            place: Which denoiser; see `CollectedRun.places`.
            denoiser: The denoiser in full precision.
            traced: Its trace.
        """
        recipe = self.config.recipe
        if self.sensitivity is None:
            return recipe
        if not self.assigned_bits:
            # the solver stops after a minute, so that slow processes may find other bits
            bits = self._assign(place, denoiser, traced) if self.processes.is_main else None
            self.assigned_bits.update(self.processes.share(bits) or {})
        names = [layer.name for layer in traced.layers if name_within(place, layer.name) in self.assigned_bits]
        rules = [
            layer_rule(name, recipe).model_copy(
                update={"pattern": name, "weight_bits": self.assigned_bits[name_within(place, name)]}
            )
            for name in names
        ]
        return recipe.model_copy(update={"layers": (*recipe.layers, *rules)})

    def _assign(self, place: str, denoiser: nn.Module, traced: Trace) -> dict[str, int]:
        """Returns the weight bits of each layer of all denoisers; those that are not at hand are loaded for it."""
        assert self.sensitivity is not None
        measured, config, costs = Sensitivity.load(self.sensitivity), self.config, []
        for other in CollectedRun.open(self.run).places:
            each = (denoiser, traced) if other == place else load_traced(self, other)[:2]
            costs.append(layer_costs(measured, config.bits, config.recipe, *each, other))
        return spend_budget(config.bits, costs)


def _usual_matmul(device: torch.device) -> Literal["float32", "tf32"]:
    """Returns how float32 numbers are multiplied if the user does not choose."""
    return "tf32" if device.type == "cuda" else "float32"


def resolve_task(config: ReconstructConfig, run: RunFolder, processes: Processes) -> Task:
    """Decides what the configuration leaves open, without loading the model."""
    selection = run.open("select")
    device = resolve_device(processes.device_name(config.device))
    if config.matmul == "tf32" and device.type != "cuda":
        raise UsageError("--matmul tf32 needs an NVIDIA GPU, but this reconstruction runs on the CPU.")
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
    return Task(config, run, selection, sensitivity, batch_size, hyperparameters, device, processes)


def prepare(
    task: Task, place: str = "", note: Callable[[str], None] = lambda _: None, plan: QuantizationPlan | None = None
) -> ReconstructionContext:
    """Loads a denoiser and plans its layers and units.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        note: Called with a sentence on where its weights are.
        plan: The bits of its layers, if they are decided already.
    """
    config = task.config
    denoiser, traced, batches = load_traced(task, place, note)
    if plan is None:
        plan = plan_network(traced, task.recipe(place, denoiser, traced), config.bits)
    network = SwitchableNetwork(denoiser, list(plan.layers), list(plan.attentions))
    granularity: Literal["block", "layer"] = "layer" if config.recipe.learn.granularity == "layer" else "block"
    all_units = units(denoiser, traced, set(plan.layers), granularity)
    return ReconstructionContext(network, traced, plan, all_units, _learning(all_units, config), batches)


def load_traced(
    task: Task, place: str, note: Callable[[str], None] = lambda _: None
) -> tuple[nn.Module, Trace, Batches]:
    """Loads a denoiser with its calibration set, and traces a call of it.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        note: Called with a sentence on where its weights are.

    Raises:
        UsageError: The recipe needs all weights in memory, and they stay on disk.
    """
    config = task.config
    denoiser = CollectedRun.open(task.run).load_denoiser(task.device, config.weights, place, note)
    if config.recipe.ranges.float_input_share and any(map(is_stored, denoiser.modules())):
        raise UsageError(
            f"The recipe '{config.recipe.name}' measures which inputs stay in floating point by a backward pass, which"
            " needs all weights in memory, but here they stay on disk.",
            hint="--weights memory, --recipe default, or float_input_share = 0 in the recipe's [ranges]",
        )
    batches = Batches(CalibrationSet.load(task.selection.within(place)), task.batch_size, task.device)
    (args, kwargs), *_ = iter(batches.few(1))
    return denoiser, trace(denoiser, args, kwargs), batches


def _learning(all_units: list[Unit], config: ReconstructConfig) -> list[Unit]:
    """Returns the units that learn."""
    for pattern in config.units:
        if not any(fnmatchcase(unit.name, pattern) for unit in all_units):
            raise UsageError(
                f"The pattern '{pattern}' of --units matches none of the {len(all_units)} units, such as"
                f" '{all_units[len(all_units) // 2].name}'."
            )
    if config.recipe.learn.granularity == "none":
        return []
    return [unit for unit in all_units if not config.units or any(fnmatchcase(unit.name, p) for p in config.units)]


@contextmanager
def arithmetic(task: Task) -> Iterator[None]:
    """Makes convolutions deterministic while entered, and lets products use TF32 if the task asks for it."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = task.matmul == "tf32"
    try:
        with repeatable_convolutions():
            yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before
