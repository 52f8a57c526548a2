"""Reconstructs unit after unit: captures its calls, learns, and freezes the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from edadm_cli.artifacts import UnitLosses
from edadm_cli.calibrate.nearest import nearest_params_of
from edadm_cli.errors import InputError
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.quant.attention import OPERANDS, QuantizedAttention
from edadm_cli.quant.layers import quantized_layer, quantized_layers
from edadm_cli.quant.network import fill_layer
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import UnitForm, probe_units
from edadm_cli.reconstruct.capture import UnitCalls, capture_units
from edadm_cli.reconstruct.capture_groups import next_group
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.finished import FinishedUnits, find_links
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.network_wise import WholeReconstruction, whole_denoiser
from edadm_cli.reconstruct.rows import RowCache, Rows
from edadm_cli.reconstruct.trainer import UnitLearner
from edadm_cli.reconstruct.unit_data import UnitData, UnitResult, layer_targets

_SEED_STRIDE = 1_000_003


def unit_seed(seed: int, index: int) -> int:
    """Returns the random seed of one unit, so that a resumed run generates the same numbers as an uninterrupted one."""
    return (seed * _SEED_STRIDE + index) % 2**63


@dataclass(frozen=True)
class Workspace:
    """The storage and the processes of a reconstruction.

    Args:
        cache: Stores the rows of inputs and targets.
        checkpoints: Stores the finished units.
        processes: The processes that share the work.
    """

    cache: RowCache
    checkpoints: UnitCheckpoints
    processes: Processes = ALONE


class BlockReconstruction:
    """Learns unit after unit in execution order, each on inputs from the units quantized before it.

    Args:
        network: The denoiser; every planned layer in it is quantized at the end.
        plan: The bits of every layer.
        ranges: The initial parameters; codes are rounded to nearest or learned.
        batches: The calibration set.
        hyperparameters: The numbers of the optimization.
        seed: The seed of the stage.
        workspace: The storage and the processes.
    """

    def __init__(
        self,
        network: SwitchableNetwork,
        plan: QuantizationPlan,
        ranges: Mapping[str, Tensor],
        batches: Batches,
        hyperparameters: Hyperparameters,
        seed: int,
        workspace: Workspace,
    ) -> None:
        self.network, self.plan, self.ranges, self.batches = network, plan, ranges, batches
        self.params = dict(ranges)
        self.hyperparameters, self.seed, self.workspace = hyperparameters, seed, workspace
        self.passes = {"full_precision": 0, "quantized": 0}
        self._forms: dict[str, UnitForm] = {}

    def run(
        self, units: Sequence[Unit], advance: Callable[[int], None], learning: Collection[str] | None = None
    ) -> dict[str, UnitResult]:
        """Reconstructs all units.

        Args:
            units: All units of the denoiser, in execution order.
            advance: Progress callback, called after every unit.
            learning: Names of the units that learn, if not all do; the others are rounded to nearest.

        Returns:
            The result of each unit that learned, by name. The parameters of all units are in `params` afterwards.
        """
        workspace, chosen = self.workspace, [unit for unit in units if learning is None or unit.name in learning]
        numbers = {unit.name: number for number, unit in enumerate(units)}
        results = self._resume(numbers, chosen)
        waiting = [unit for unit in chosen if unit.name not in results]
        with self.network.full_precision():
            self._forms = probe_units(self.network.denoiser, waiting, self.batches)
            finished = self._finished_units(units) if waiting else None
        captured: dict[str, UnitCalls] = {}
        # If layers are learned one by one, attentions belong to no unit and keep their searched ranges.
        loose = [name for name in self.plan.attentions if not any(name in unit.attentions for unit in units)]
        freeze_attentions(self.network, self.plan, loose, self.ranges)
        for number, unit in enumerate(units):
            if waiting and waiting[0] is unit:
                if unit.name not in captured:
                    captured = self._capture_ahead(waiting, finished)
                results[unit.name] = self._learn(number, waiting.pop(0), captured.pop(unit.name), finished)
            workspace.processes.check()
            params = results[unit.name].params if unit.name in results else self._nearest(unit)
            freeze_unit(self.network, self.plan, unit, {**self.ranges, **params})
            self.params |= params
            if finished is not None:
                finished.add(unit)
            advance(1)
        if finished is not None:
            finished.close()
        return results

    def learn_together(
        self,
        units: Sequence[Unit],
        number: int,
        batches: Batches,
        advance: Callable[[int], None],
        step_effects: Tensor | None = None,
    ) -> UnitLosses:
        """Learns units that have learned by themselves once more, all together, and freezes the result.

        Args:
            units: The units, in execution order.
            number: The number of units of the denoiser.
            batches: The samples to learn from, which need not be those of the units.
            advance: Progress callback, called after every iteration.
            step_effects: How far the errors of each sampler step move the final sample, `(T,)`; without them all steps
                count alike.
        """
        checkpoints, processes = self.workspace.checkpoints, self.workspace.processes
        whole = whole_denoiser(self.network, units)
        result = checkpoints.load(number, whole)
        processes.wait()
        if result is None:
            together = WholeReconstruction(
                self.network, self.plan, self.ranges, batches, self.hyperparameters, step_effects
            )
            seed = unit_seed(self.seed, number)
            result = together.learn(whole, self.params, seed, self.workspace.cache, advance, processes)
            self.passes["full_precision"] += 1
            if processes.is_main:
                checkpoints.save(number, whole, result)
            processes.wait()
            if not processes.is_main:  # all processes continue with the bytes of the main process
                result = checkpoints.load(number, whole) or result
        self.params |= result.params
        for unit in units:
            freeze_unit(self.network, self.plan, unit, self.params)
        return result.losses

    def _nearest(self, unit: Unit) -> dict[str, Tensor]:
        """Returns the parameters of a unit that does not learn."""
        return nearest_params_of(unit.layers, self.network.float_weight, self.plan, self.ranges)

    def _resume(self, numbers: Mapping[str, int], chosen: Sequence[Unit]) -> dict[str, UnitResult]:
        """Returns the units that a killed run finished; every process reads them before any of them writes."""
        if self.workspace.processes.is_main:
            self.workspace.cache.clear()
        results = {unit.name: self.workspace.checkpoints.load(numbers[unit.name], unit) for unit in chosen}
        self.workspace.processes.wait()
        return {name: result for name, result in results.items() if result is not None}

    def _finished_units(self, units: Sequence[Unit]) -> FinishedUnits:
        """Returns the stubs of finished units, which replay stored outputs instead of computing them again."""
        denoiser, forms = self.network.denoiser, dict(self._forms)
        rest = [unit for unit in units if unit.name not in forms]
        try:
            forms |= probe_units(denoiser, rest, self.batches) if rest else {}
        except InputError:
            for unit in rest:
                with suppress(InputError):  # a unit that cannot be captured runs in every pass
                    forms |= probe_units(denoiser, [unit], self.batches)
        links = find_links(denoiser, units, forms, self.batches)
        cache, rows = self.workspace.cache, self.batches.num_rows
        return FinishedUnits(denoiser, units, links, forms, cache, rows, self._mixes_inputs)

    def _learn(self, number: int, unit: Unit, float_calls: UnitCalls, finished: FinishedUnits | None) -> UnitResult:
        workspace = self.workspace
        data = self._gather(unit, float_calls, finished)
        seed = unit_seed(self.seed, number)
        learner = UnitLearner(
            self.network, unit, self.plan, self.ranges, data, self.hyperparameters, seed, processes=workspace.processes
        )
        result = learner.learn()
        workspace.cache.release([*data.quantized.tensors, *data.layer_targets.values(), *float_calls.outputs])
        if self._mixes_inputs:
            workspace.cache.release(float_calls.tensors)
        if workspace.processes.is_main:
            workspace.checkpoints.save(number, unit, result)
        workspace.processes.wait()
        if not workspace.processes.is_main:  # all processes continue with the bytes of the main process
            result = workspace.checkpoints.load(number, unit) or result
        return result

    def _gather(self, unit: Unit, float_calls: UnitCalls, finished: FinishedUnits | None) -> UnitData:
        """Collects the inputs and targets of a unit, in this process's memory as far as the budget allows."""
        cache, processes, size = self.workspace.cache, self.workspace.processes, self.batches.batch_size
        targets: dict[str, Rows] = {}
        if self.hyperparameters.layer_loss_weight > 0:
            targets = layer_targets(self.network, unit, float_calls, size, cache, processes)
        if not self._mixes_inputs:
            cache.release(float_calls.tensors)
        (quantized,) = capture_units(
            self.network.denoiser,
            [unit],
            self._forms,
            self.batches,
            cache,
            with_outputs=False,
            processes=processes,
            finished=finished,
        )
        self.passes["quantized"] += 1
        if cache.shared:
            float_calls.outputs = [cache.settle(rows, size) for rows in float_calls.outputs]
            quantized.tensors = [cache.settle(rows, size) for rows in quantized.tensors]
            targets = {name: cache.settle(rows, size) for name, rows in targets.items()}
            processes.wait()
        return UnitData(float_calls, quantized, targets)

    @property
    def _mixes_inputs(self) -> bool:
        return self.hyperparameters.input_drop > 0

    def _capture_ahead(self, units: Sequence[Unit], finished: FinishedUnits | None) -> dict[str, UnitCalls]:
        """Captures the full-precision calls of as many of the next units as the budget allows, in one pass."""
        cache, with_layers = self.workspace.cache, self.hyperparameters.layer_loss_weight > 0
        later = 0 if finished is None else finished.expected_bytes()

        def fits(size: int) -> bool:
            return cache.fits(size + later)

        group, learning = next_group(units, self._forms, self.batches.num_rows, with_layers, fits)
        reserve = 0 if self._mixes_inputs else learning + later
        if len(group) == 1 and not self._mixes_inputs:  # its quantized inputs take the place of these
            inputs = sum(kind.bytes for kind in self._forms[group[0].name].inputs)
            stored = 0 if finished is None else finished.expected_bytes([group[0].name])
            reserve = learning - self.batches.num_rows * inputs + stored
        with self.network.full_precision():
            captured = capture_units(
                self.network.denoiser,
                group,
                self._forms,
                self.batches,
                cache,
                with_outputs=True,
                reserve=reserve,
                processes=self.workspace.processes,
            )
        self.passes["full_precision"] += 1
        return {unit.name: call for unit, call in zip(group, captured, strict=True)}


def freeze_unit(network: SwitchableNetwork, plan: QuantizationPlan, unit: Unit, params: Mapping[str, Tensor]) -> None:
    """Puts the deployed form of a unit's layers and attention products into the network.

    Args:
        network: The denoiser.
        plan: The bits of every layer.
        unit: The unit that is frozen.
        params: The learned parameters, or weights rounded to nearest with searched ranges.
    """
    for name in unit.layers:
        layer = network.float_layers[name]
        frozen = quantized_layer(layer, plan.layers[name], device=network.device)
        for part in quantized_layers(frozen).values():
            part.keeps_float_weight = False  # the full-precision weight is in memory already
        fill_layer(frozen, name, params)
        network.put_layer(name, frozen)
    freeze_attentions(network, plan, [name for name in unit.attentions if name in plan.attentions], params)


def freeze_attentions(
    network: SwitchableNetwork, plan: QuantizationPlan, names: Sequence[str], params: Mapping[str, Tensor]
) -> None:
    """Quantizes attention products permanently, with the scales among `params`."""
    for name in names:
        scales = {operand: params[f"{name}.{operand}_scale"] for operand in OPERANDS}
        network.put_processor(name, QuantizedAttention(plan.attentions[name], scales).to(network.device))
