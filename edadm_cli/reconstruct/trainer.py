r"""Fine-grained block reconstruction of one unit.

    input   = x~ with probability 0.5 elementwise, else x          (QDrop)
    L_block = |out_q - out_fp|^2
    L       = L_block + gamma * sum over all layers except the last of c_layer |layer_q - layer_fp|^2

where |.|^2 is the squared error summed over channels and averaged over the rest, and c_layer = 1, or
|out_fp|^2 / |layer_fp|^2 if losses are relative: the outputs of a block's layers differ in size, and the largest would
otherwise dominate the sum. One quantized forward per iteration gives every term; the full-precision targets are
computed once.

References:
    EDA-DM, arXiv 2401.04585, section 4.2; AdaRound, arXiv 2004.10568; QDrop, arXiv 2203.05740; LSQ, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import UnitLosses
from edadm_cli.errors import InputError
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.rounding import rounding_regularizer, sharpness_at
from edadm_cli.reconstruct.capture import layer_outputs
from edadm_cli.reconstruct.held_back import RowSplit
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.minibatch import MiniBatch
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import Optimization, make_step
from edadm_cli.reconstruct.rows import Rows, chunks
from edadm_cli.reconstruct.trainable_layers import Drop, LearnedUnit, Share, round_level
from edadm_cli.reconstruct.unit_data import (
    EVALUATED_ROWS,
    UnitData,
    UnitResult,
    channel_loss,
    on_device,
    scaled_rows,
    size_of,
)

_CURVE_POINTS = 50
_TINY = 1e-12
_REGULARIZER_START = 0.2
_BETA_FROM, _BETA_TO = 20.0, 2.0


@dataclass(frozen=True)
class Phase:
    """The iterations from `start` to `stop`, and whether they learn rounding and activation scales."""

    start: int
    stop: int
    rounding: bool
    scales: bool


class UnitLearner:
    """Learns the rounding and the scales of one unit, in its place in the network.

    Args:
        network: The partly quantized network; the unit's layers are replaced by learnable ones.
        unit: The unit that is reconstructed.
        plan: The bits of every layer.
        params: The ranges that were searched before, such as `<layer>.weight_scale`.
        data: The inputs and targets.
        hyperparameters: The numbers of the optimization.
        seed: The seed of the order of samples and of every mask; each unit has its own, so that a resume changes
            nothing.
        processes: The processes that learn the unit together; each takes a part of the rows of every step.
        learned: What the unit's layers have learned before, where learning goes on from it.
        split: The rows to learn from, and those with which the loss is compared; by default all rows are both.
    """

    def __init__(
        self,
        network: SwitchableNetwork,
        unit: Unit,
        plan: QuantizationPlan,
        params: Mapping[str, Tensor],
        data: UnitData,
        hyperparameters: Hyperparameters,
        seed: int,
        processes: Processes = ALONE,
        learned: Mapping[str, Tensor] | None = None,
        split: RowSplit | None = None,
    ) -> None:
        self.network, self.unit, self.data = network, unit, data
        rows = range(data.quantized.rows)
        self.split = split or RowSplit(rows, rows)
        self.hyperparameters, self.processes, self.device = hyperparameters, processes, network.device
        self.share = Share.of(hyperparameters.batch_size, processes)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.activation_drop = Drop(hyperparameters.activation_drop, self.generator, self.share)
        self.input_drop = Drop(hyperparameters.input_drop, self.generator, self.share)
        self.learned = self._put_learned_unit(plan, params, learned)
        self.layer_weights = self._weigh_layers()
        self.batch, self.groups = self._mini_batch()
        self.rows = [0] * self.share.size
        self.batch.load(self.rows)  # a CUDA graph warms up on whatever the buffers hold
        self._upcoming: list[int] | None = None
        self.pull, self.beta = torch.zeros((), device=self.device), torch.ones((), device=self.device)
        # A unit of one layer is the learnable layer itself, a block is the module around its layers.
        self.module: nn.Module = network.denoiser.get_submodule(unit.name)

    def _put_learned_unit(
        self, plan: QuantizationPlan, params: Mapping[str, Tensor], before: Mapping[str, Tensor] | None
    ) -> LearnedUnit:
        """Puts learnable layers and attention products in the place of the unit's own, and returns them."""
        learned = LearnedUnit(
            {name: self.network.float_layers[name] for name in self.unit.layers},
            plan.layers,
            {name: plan.attentions[name] for name in self.unit.attentions if name in plan.attentions},
            params,
            self.activation_drop,
            self.hyperparameters,
            before,
        )
        for name, module in learned.modules.items():
            self.network.put_layer(name, module)
        for name, attention in learned.attentions.items():
            self.network.put_processor(name, attention)
        return learned

    def _mini_batch(self) -> tuple[MiniBatch, dict[str, list[Tensor]]]:
        """Returns the buffers that hold the rows of one step, and their tensors by what they are."""
        float_calls = self.data.full_precision
        groups: dict[str, list[Rows]] = {
            "inputs": self.data.quantized.tensors,
            "float": float_calls.tensors if self.input_drop.level else [],
            "outputs": float_calls.outputs,
            "layers": list(self.data.layer_targets.values()),
            "factors": [] if self.data.row_factors is None else [self.data.row_factors],
        }
        batch = MiniBatch([rows for group in groups.values() for rows in group], self.share.size, self.device)
        tensors = iter(batch.calls)
        return batch, {name: [next(tensors) for _ in group] for name, group in groups.items()}

    def learn(self, advance: Callable[[int], None] = lambda _: None) -> UnitResult:
        """Runs the optimizer and decides the rounding; a unit that learning made worse stays as it was.

        Args:
            advance: Progress callback, called after every iteration.

        Raises:
            InputError: The loss is not finite.
        """
        # h starts at the fraction that rounding down drops, so that deciding it now rounds to nearest,
        # or on the side that was decided before.
        before = self.reconstruction_loss()
        as_it_was = self.learned.params()
        try:
            curve = [loss for phase in self.phases() for loss in self._learn_phase(phase, advance)]
        finally:
            self.batch.close()
        self.learned.rounding.sharpen(self._sharpness(self.hyperparameters.iterations))
        soft, after = self.reconstruction_loss(decided=False), self.reconstruction_loss()
        if not math.isfinite(after):
            raise InputError(
                f"The reconstruction loss of '{self.unit.name}' is not finite.",
                hint="lower weight_learning_rate or activation_learning_rate in the recipe",
            )
        undecided = self.learned.rounding.undecided()
        is_worse = after > before
        losses = UnitLosses(
            loss_before=before,
            loss_after=before if is_worse else after,
            curve=tuple(curve),
            loss_soft=soft,
            undecided=undecided,
            is_nearest=is_worse,
        )
        return UnitResult(as_it_was if is_worse else self.learned.params(), losses)

    def phases(self) -> list[Phase]:
        """Returns the phases: all values together, or rounding with float activations first and the scales after it."""
        count, first = self.hyperparameters.iterations, self.rounding_iterations
        if not self.hyperparameters.rounding_first:
            return [Phase(0, count, rounding=True, scales=bool(self.learned.scales.names))]
        phases = [Phase(0, first, rounding=True, scales=False)]
        return phases + ([Phase(first, count, rounding=False, scales=True)] if self.learned.scales.names else [])

    @property
    def rounding_iterations(self) -> int:
        """The iterations in which rounding is learned."""
        share = self.hyperparameters.rounding_first
        return round(self.hyperparameters.iterations * share) if share else self.hyperparameters.iterations

    def _learn_phase(self, phase: Phase, advance: Callable[[int], None] = lambda _: None) -> list[float]:
        """Runs the iterations of a phase; returns the loss at some of them."""
        self.learned.decided = not phase.rounding
        # A phase that learns only rounding drops every activation to full precision.
        self.activation_drop.level = round_level(
            self.hyperparameters.activation_drop if phase.scales or not self.hyperparameters.rounding_first else 1.0
        )
        step = make_step(self, self.optimization(phase))
        every = max(1, self.hyperparameters.iterations // _CURVE_POINTS)
        curve: list[Tensor] = []  # read at the end, so that no step waits for the one before it
        for iteration in range(phase.start, phase.stop):
            self.set_iteration(iteration)
            loss = step()
            if iteration % every == 0:
                loss = loss.clone()
                self.processes.sum(loss)
                curve.append(loss)
            self.after_iteration(iteration)
            advance(1)
        return torch.stack(curve).tolist() if curve else []

    def after_iteration(self, iteration: int) -> None:
        """Does nothing after an iteration; see `WholeLearner`."""

    def loss(self) -> Tensor:
        """Returns this process's share of the loss of the chosen rows, from one forward of the quantized unit."""
        up = self.learned.materialize()
        names = list(self.data.layer_targets)
        args, kwargs = self.data.full_precision.call(self._inputs())
        with layer_outputs(self.network.denoiser, names) as inner:
            outputs = self.data.full_precision.outputs_of(self.module(*args, **kwargs))
        targets = self.groups["outputs"]
        total = torch.stack([channel_loss(o, t) for o, t in zip(outputs, targets, strict=True)]).sum()
        if names:
            layers = zip(names, self.groups["layers"], self.layer_weights, strict=True)
            inner_losses = [weight * channel_loss(inner[name], target) for name, target, weight in layers]
            total = total + torch.stack(inner_losses).sum()
        if self.hyperparameters.rounding_regularizer:
            total = total + self.pull * rounding_regularizer(up, self.beta)
        return total if self.share.is_whole else total * self.share.weight

    def _weigh_layers(self) -> list[float]:
        """Returns gamma c_layer of every layer with a target; all processes take the sizes of the same first rows."""
        gamma, targets = self.hyperparameters.layer_loss_weight, list(self.data.layer_targets.values())
        if not self.hyperparameters.relative_layer_losses:
            return [gamma] * len(targets)
        block = sum(map(size_of, self.data.full_precision.outputs))
        return [gamma * block / max(size_of(rows), _TINY) for rows in targets]

    def _inputs(self) -> list[Tensor]:
        """Returns the quantized network's inputs, with elements of the full-precision ones mixed in."""
        quantized, float_calls = self.groups["inputs"], self.groups["float"]
        if not float_calls:
            return quantized
        floating = [number for number, x in enumerate(float_calls) if x.is_floating_point()]
        chosen = (
            floating[:1] if self.hyperparameters.mixed_inputs == "hidden" else floating
        )  # the hidden state comes first
        mixed = list(quantized)
        for number in chosen:
            mask = self.input_drop.mask(float_calls[number])
            if mask is not None:
                mixed[number] = torch.where(mask, float_calls[number], quantized[number])
        return mixed

    @torch.no_grad()
    def reconstruction_loss(self, decided: bool = True) -> float:
        """Returns the mean block loss over the rows that are compared, every activation quantized.

        Processes share the rows, and the sum does not depend on their number.

        Args:
            decided: Whether h is rounded to 0 or 1, as it is when deployed.
        """
        losses: dict[int, Tensor] = {}
        for number, count, outputs, targets in self._outputs(decided):
            each = [channel_loss(output, target) for output, target in zip(outputs, targets, strict=True)]
            losses[number] = count * torch.stack(each).sum()
        return float(self._summed(losses)) / len(self.split.compared)

    def _outputs(self, decided: bool) -> Iterator[tuple[int, int, list[Tensor], list[Tensor]]]:
        """Yields the number, rows, outputs and targets of each part of the rows that is this process's."""
        self.activation_drop.active, self.learned.decided = False, decided
        self.learned.materialize()
        calls, float_calls = self.data.quantized, self.data.full_precision
        parts = self._row_parts()
        for number in range(self.processes.index, len(parts), self.processes.count):
            places = parts[number]
            args, kwargs = float_calls.call(on_device(calls.tensors, places, self.device))
            outputs = float_calls.outputs_of(self.module(*args, **kwargs))
            targets = on_device(float_calls.outputs, places, self.device)
            if self.data.row_factors is not None:
                (factors,) = on_device([self.data.row_factors], places, self.device)
                outputs, targets = scaled_rows(outputs, factors), scaled_rows(targets, factors)
            yield number, len(places), outputs, targets
        self.activation_drop.active, self.learned.decided = True, False

    def _row_parts(self) -> list[Sequence[int]]:
        """Returns the rows that are compared, divided into the parts that go through the unit at once."""
        rows = self.split.compared
        return [rows[part.start : part.stop] for part in chunks(len(rows), self.rows_evaluated)]

    @property
    def rows_evaluated(self) -> int:
        """The rows of a forward without gradients."""
        return max(self.hyperparameters.batch_size, EVALUATED_ROWS)

    def _summed(self, values: Mapping[int, Tensor]) -> Tensor:
        """Returns the sum over all parts of the rows in float64; the order of addition does not depend on processes."""
        table = torch.zeros(len(self._row_parts()), dtype=torch.float64, device=self.device)
        for number, value in values.items():
            table[number] = value
        self.processes.sum(table)
        return table.cpu().cumsum(dim=0)[-1]

    def set_iteration(self, iteration: int) -> None:
        """Chooses the rows of an iteration, the sharpness of h and the strength of the rounding regularizer."""
        self.rows = self._upcoming or self._next_rows()
        self._upcoming = self._next_rows() if iteration + 1 < self.hyperparameters.iterations else None
        self.batch.load(self.rows, self._upcoming)
        start = _REGULARIZER_START * self.rounding_iterations
        progress = min(1.0, (iteration - start) / max(1.0, self.rounding_iterations - start))
        self.learned.rounding.sharpen(self._sharpness(iteration))
        self.pull.fill_(self.hyperparameters.rounding_regularizer if progress >= 0 else 0.0)
        self.beta.fill_(_BETA_TO + (_BETA_FROM - _BETA_TO) * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0))))

    def _sharpness(self, iteration: int) -> float:
        """Returns tau at the beginning of an iteration; the last value is that at the end of the last iteration."""
        progress = min(1.0, iteration / max(1, self.rounding_iterations))
        last, start = self.hyperparameters.rounding_sharpness, self.hyperparameters.rounding_sharpness_start
        return sharpness_at(progress, last, start)

    def after_step(self) -> None:
        """Keeps scales positive once the optimizer has changed them."""
        self.learned.keep_in_range()

    def _next_rows(self) -> list[int]:
        """Returns the rows of the next step; all processes generate the same ones, and each takes its part."""
        chosen = torch.randint(len(self.split.learned), (self.hyperparameters.batch_size,), generator=self.order)
        return [self.split.learned[number] for number in chosen[self.share.start : self.share.stop].tolist()]

    def optimization(self, phase: Phase | None = None) -> Optimization:
        """Returns Adam for the values that a phase learns (all without a phase), at the recipe's initial rates."""
        phase = phase or Phase(
            0, self.hyperparameters.iterations, rounding=True, scales=bool(self.learned.scales.names)
        )
        rates: list[tuple[nn.Parameter, float]] = []
        if phase.rounding:
            rates.append((self.learned.rounding.variables, self.hyperparameters.weight_learning_rate))
        if phase.scales:
            rates.append((self.learned.scales.factor, self.hyperparameters.activation_learning_rate))
        if self.learned.vectors.names:
            rates.append((self.learned.vectors.delta, self.hyperparameters.channel_learning_rate))
        decays = self.hyperparameters.rate_decay == "cosine" or not phase.rounding
        return Optimization(rates, max(1, phase.stop - phase.start), self.device, decays)
