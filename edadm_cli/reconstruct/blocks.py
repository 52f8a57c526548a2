"""The walk over the units: capture, learn, freeze, next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from edadm_cli.models.units import Unit
from edadm_cli.quant.attention import OPERANDS, QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer, SplitLayer, quantized_layer
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.capture import Batches, UnitCalls, capture_units
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.learn import UnitData, UnitLearner, UnitResult, layer_targets
from edadm_cli.reconstruct.network import SwitchableNetwork

_SEED_STRIDE = 1_000_003
_BYTES = 4  # captured tensors are float32


def unit_seed(seed: int, index: int) -> int:
    """Seed of one unit's randomness, so that a resume draws what an undisturbed run draws."""
    return (seed * _SEED_STRIDE + index) % 2**63


class BlockReconstruction:
    """Learns unit after unit in execution order, each on inputs from the units quantized before it.

    Args:
        network: The denoiser; when done, every planned layer in it is quantized.
        plan: Bits of every layer.
        ranges: Initial parameters.
        batches: The calibration set.
        recipe: How units learn.
        seed: Seed of the stage.
        memory_budget: Bytes for captured tensors.
        checkpoints: Where finished units are kept.
    """

    def __init__(
        self,
        network: SwitchableNetwork,
        plan: QuantizationPlan,
        ranges: Mapping[str, Tensor],
        batches: Batches,
        recipe: Hyperparameters,
        seed: int,
        memory_budget: int,
        checkpoints: UnitCheckpoints,
    ) -> None:
        self.network, self.plan, self.ranges, self.batches = network, plan, ranges, batches
        self.recipe, self.seed, self.memory_budget, self.checkpoints = recipe, seed, memory_budget, checkpoints

    def run(self, units: Sequence[Unit], advance: Callable[[int], None]) -> dict[str, UnitResult]:
        """Learn all units; `advance` is told of each one that is done."""
        results: dict[str, UnitResult] = {}
        captured: dict[str, UnitCalls] = {}
        row_bytes = self._row_bytes(units)
        self._freeze_attentions([name for name in self.plan.attentions if not any(name in u.attentions for u in units)])
        for index, unit in enumerate(units):
            result = self.checkpoints.load(index, unit)
            if result is None:
                if unit.name not in captured:
                    captured = self._capture_ahead(units[index:], row_bytes)
                result = self._learn(index, unit, captured.pop(unit.name))
                self.checkpoints.save(index, unit, result)
            self._freeze(unit, result.params)
            results[unit.name] = result
            advance(1)
        return results

    def _learn(self, index: int, unit: Unit, exact: UnitCalls) -> UnitResult:
        (quantized,) = capture_units(self.network.denoiser, [unit], self.batches, with_outputs=False)
        inner = unit.layers[:-1] if self.recipe.layer_loss_weight > 0 else ()
        targets = layer_targets(self.network, unit, inner, exact, self.batches.batch_size) if inner else None
        data = UnitData(exact, quantized, targets)
        seed = unit_seed(self.seed, index)
        return UnitLearner(self.network, unit, self.plan, self.ranges, data, self.recipe, seed).learn()

    def _capture_ahead(self, units: Sequence[Unit], row_bytes: Mapping[str, int]) -> dict[str, UnitCalls]:
        """Full-precision calls of as many of the next units as half the budget holds, in one pass."""
        rows = len(self.batches.calibration) * self.batches.calibration.branches
        group, used = [units[0]], row_bytes[units[0].name] * rows
        for unit in units[1:]:
            used += row_bytes[unit.name] * rows
            if used > self.memory_budget // 2:
                break
            group.append(unit)
        with self.network.full_precision():
            calls = capture_units(self.network.denoiser, group, self.batches, with_outputs=True)
        return {unit.name: call for unit, call in zip(group, calls, strict=True)}

    def _row_bytes(self, units: Sequence[Unit]) -> dict[str, int]:
        """Bytes that one row of a unit's inputs and outputs takes, by one forward of one sample."""
        with self.network.full_precision():
            calls = capture_units(self.network.denoiser, units, self.batches.one_sample(), with_outputs=True)
        return {
            unit.name: _BYTES * sum(t.numel() // call.rows for t in (*call.tensors, *call.outputs))
            for unit, call in zip(units, calls, strict=True)
        }

    def _freeze(self, unit: Unit, params: Mapping[str, Tensor]) -> None:
        """Put the deployed form of a unit's layers into the network."""
        for name in unit.layers:
            layer = self.network.float_layers[name]
            frozen = quantized_layer(layer, self.plan.layers[name])
            fill_layer(frozen, name, params)
            self.network.put_layer(name, frozen)
        self._freeze_attentions([name for name in unit.attentions if name in self.plan.attentions], params)

    def _freeze_attentions(self, names: Sequence[str], params: Mapping[str, Tensor] | None = None) -> None:
        """Quantize attention products for good: with what a unit learned, or, for those that lie in no unit because
        layers are learned one by one, with the searched ranges.
        """
        found = self.ranges if params is None else params
        for name in names:
            scales = {operand: found[f"{name}.{operand}_scale"] for operand in OPERANDS}
            quantized = QuantizedAttention(self.plan.attentions[name], scales)
            self.network.put_processor(name, quantized.to(self.batches.device))


def fill_layer(layer: QuantizedLayer | SplitLayer, name: str, params: Mapping[str, Tensor]) -> None:
    """Set the parameters of one deployed layer, or of its parts."""
    named: list[tuple[str, nn.Module]] = [(name, layer)]
    if isinstance(layer, SplitLayer):
        named = [(f"{name}.part{index}", part) for index, part in enumerate(layer.parts)]
    for key, part in named:
        assert isinstance(part, QuantizedLayer)
        part.set_parameters(**{own: params[f"{key}.{own}"] for own, _ in part.parameters_by_name()})
