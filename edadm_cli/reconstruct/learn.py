r"""Fine-grained block reconstruction of one unit.

    input   = x~ with probability 0.5 elementwise, else x          (QDrop)
    L_block = |out_q - out_fp|^2
    L       = L_block + gamma * sum over layers but the last of c_layer |layer_q - layer_fp|^2

with |.|^2 the squared error summed over channels and averaged over the rest, and c_layer = 1, or
|out_fp|^2 / |layer_fp|^2 where losses are relative: layers of one block differ in the size of their outputs, and the
largest would else be most of what the sum sees. One quantized forward an iteration gives every term; the full-precision
targets are computed once.

References:
    EDA-DM, arXiv 2401.04585, section 4.2; AdaRound, arXiv 2004.10568; QDrop, arXiv 2203.05740; LSQ, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.rounding import rounding_regularizer, sharpness_at, undecided_share
from edadm_cli.reconstruct.capture import UnitCalls, layer_outputs
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.learned import Drop, LearnedUnit, Share, round_level
from edadm_cli.reconstruct.minibatch import MiniBatch
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import Optimization, make_step
from edadm_cli.reconstruct.rows import RowCache, Rows, chunks

_CURVE_POINTS = 50
EVALUATED_ROWS = 64
_TINY = 1e-12
_REGULARIZER_START = 0.2
_BETA_FROM, _BETA_TO = 20.0, 2.0


@dataclass
class UnitData:
    """What one unit learns from: rows of inputs and targets.

    The full-precision inputs may be closed where none of them is mixed into the quantized network's.
    """

    full_precision: UnitCalls
    quantized: UnitCalls
    layer_targets: dict[str, Rows]


@dataclass
class UnitResult:
    """What one unit learned.

    Attributes:
        params: Its quantization parameters under the names of the artifact.
        loss_before: The loss with weights rounded to nearest.
        loss_after: The loss with the rounding that is deployed.
        curve: What the optimizer minimised, at up to 50 iterations.
        loss_soft: The loss at the end of learning, before h was rounded to 0 or 1.
        undecided: The share of weights with 0.05 < h < 0.95 at that time.
        is_nearest: Whether learning made the unit worse, so that it keeps its nearest rounding.
    """

    params: dict[str, Tensor]
    loss_before: float
    loss_after: float
    curve: list[float] = field(default_factory=list)
    loss_soft: float | None = None
    undecided: float | None = None
    is_nearest: bool = False

    def losses(self) -> dict[str, Any]:
        """Returns everything but the parameters, as plain JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "params"}


def channel_loss(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2, summed over channels (dimension 1 of `[N, C, H, W]`, else the last), averaged else."""
    channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
    return torch.nn.functional.mse_loss(output, target) * channels


def layer_targets(
    network: SwitchableNetwork,
    unit: Unit,
    calls: UnitCalls,
    batch_size: int,
    cache: RowCache,
    processes: Processes = ALONE,
) -> dict[str, Rows]:
    """Full-precision outputs of the layers inside a unit, but for the last, over all of its calls, `[rows, ...]` each.

    Args:
        network: With the unit in it.
        unit: The unit.
        calls: Its full-precision calls.
        batch_size: Rows computed together.
        cache: Where the outputs go.
        processes: Those that share the rows.
    """
    targets = {name: cache.allocate(calls.rows, kind) for name, kind in calls.form.layers.items()}
    own = chunks(calls.rows, batch_size)[processes.index :: processes.count]
    with network.full_precision(), layer_outputs(network.denoiser, list(targets)) as outputs, torch.no_grad():
        for places in own:
            args, kwargs = calls.call(_on_device(calls.tensors, places, network.device))
            unit.module(*args, **kwargs)
            for name, rows in targets.items():
                rows.write(places, outputs[name])
    processes.wait()
    return targets


@dataclass(frozen=True)
class Phase:
    """Iterations `start` to `stop`, and whether rounding and activation scales are learned in them."""

    start: int
    stop: int
    rounding: bool
    scales: bool


class UnitLearner:
    """One unit with learnable rounding and scales, in its place in the network.

    Args:
        network: The partly quantized network; the unit's layers are exchanged for learnable ones.
        unit: What is reconstructed.
        plan: Bits of every layer.
        params: Ranges found before, `<layer>.weight_scale` and so on.
        data: Inputs and targets.
        recipe: How it is learned.
        seed: Of the order of samples and of every mask; the unit's own, so that a resume changes nothing.
        processes: Those that learn it together: each takes a part of the rows of every step.
    """

    def __init__(
        self,
        network: SwitchableNetwork,
        unit: Unit,
        plan: QuantizationPlan,
        params: Mapping[str, Tensor],
        data: UnitData,
        recipe: Hyperparameters,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self.network, self.unit, self.data, self.recipe, self.processes = network, unit, data, recipe, processes
        self.device = network.device
        self.share = Share.of(recipe.batch_size, processes)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.activation_drop = Drop(recipe.activation_drop, self.generator, self.share)
        self.input_drop = Drop(recipe.input_drop, self.generator, self.share)
        self.learned = LearnedUnit(
            {name: network.float_layers[name] for name in unit.layers},
            plan.layers,
            {name: plan.attentions[name] for name in unit.attentions if name in plan.attentions},
            params,
            self.activation_drop,
            recipe.relative_scale_steps,
        )
        for name, module in self.learned.modules.items():
            network.put_layer(name, module)
        for name, attention in self.learned.attentions.items():
            network.put_processor(name, attention)
        exact = data.full_precision
        groups: dict[str, list[Rows]] = {
            "inputs": data.quantized.tensors,
            "exact": exact.tensors if self.input_drop.level else [],
            "outputs": exact.outputs,
            "layers": list(data.layer_targets.values()),
        }
        self.layer_weights = self._weigh_layers()
        self.batch = MiniBatch([rows for group in groups.values() for rows in group], self.share.size, self.device)
        tensors = iter(self.batch.calls)
        self.groups = {name: [next(tensors) for _ in group] for name, group in groups.items()}
        self.rows = [0] * self.share.size
        self.batch.load(self.rows)  # a CUDA graph is warmed up on whatever is there
        self._upcoming: list[int] | None = None
        self.pull, self.beta = torch.zeros((), device=self.device), torch.ones((), device=self.device)
        # A unit of one layer is that layer's stand-in, a block is the module around its layers.
        self.module: nn.Module = network.denoiser.get_submodule(unit.name)

    def learn(self) -> UnitResult:
        """Runs the optimizer and decides the rounding; a unit that learning made worse keeps its nearest rounding.

        Raises:
            InputError: The loss is not finite.
        """
        before = self.reconstruction_loss()  # h starts at the dropped fraction, so deciding now rounds to nearest
        nearest = self.learned.params()
        curve: list[float] = []
        for phase in self.phases():
            curve += self._learn_phase(phase)
        self.learned.decided, self.activation_drop.level = False, round_level(self.recipe.activation_drop)
        self.batch.close()
        self.learned.rounding.sharpness.fill_(self._sharpness(self.recipe.iterations))
        soft, after = self.reconstruction_loss(decided=False), self.reconstruction_loss()
        if not math.isfinite(after):
            raise InputError(
                f"The reconstruction loss of '{self.unit.name}' is not finite.",
                hint="lower weight_learning_rate or activation_learning_rate in the recipe",
            )
        undecided = undecided_share(self.learned.rounding.weights(decided=False)[1].detach())
        if after > before:
            return UnitResult(nearest, before, before, curve, soft, undecided, is_nearest=True)
        if self.recipe.bias_correction:
            after = self.correct_bias(after)
        return UnitResult(self.learned.params(), before, after, curve, soft, undecided)

    def phases(self) -> list[Phase]:
        """Returns what is learned when: all together, or rounding with float activations first and then the scales."""
        count, first = self.recipe.iterations, self.rounding_iterations
        if not self.recipe.rounding_first:
            return [Phase(0, count, rounding=True, scales=bool(self.learned.scales.names))]
        phases = [Phase(0, first, rounding=True, scales=False)]
        return phases + ([Phase(first, count, rounding=False, scales=True)] if self.learned.scales.names else [])

    @property
    def rounding_iterations(self) -> int:
        """The iterations in which rounding is learned."""
        share = self.recipe.rounding_first
        return round(self.recipe.iterations * share) if share else self.recipe.iterations

    def _learn_phase(self, phase: Phase) -> list[float]:
        """Runs the iterations of a phase; returns the loss at some of them."""
        self.learned.decided = not phase.rounding
        # Where rounding is learned alone, every activation is dropped to full precision.
        self.activation_drop.level = round_level(
            self.recipe.activation_drop if phase.scales or not self.recipe.rounding_first else 1.0
        )
        step = make_step(self, self.optimization(phase))
        every = max(1, self.recipe.iterations // _CURVE_POINTS)
        curve: list[float] = []
        for iteration in range(phase.start, phase.stop):
            self.set_iteration(iteration)
            loss = step()
            if iteration % every == 0:
                loss = loss.clone()
                self.processes.sum(loss)
                curve.append(loss.item())
        return curve

    def correct_bias(self, loss: float) -> float:
        """Adds the mean error of the unit's output to the bias of its last layer, where that lowers the loss.

            b += mean over rows and positions of (out_fp - out_q)

        The last layer of a block adds to the block's output, so that the loss falls by the square of what is added.

        Args:
            loss: The deployed loss without the correction.

        Returns:
            The deployed loss.

        References:
            Data-free quantization, arXiv 1906.04721, section 4.2 (bias correction); PTQD, arXiv 2305.10657.
        """
        part = self.learned.last_part(self.unit.layers[-1])
        if part.bias is None:
            return loss
        before = part.bias
        error = self._mean_error()
        if error.shape != before.shape:  # the unit's output has other channels than its last layer's
            return loss
        part.bias = nn.Parameter(before.detach() + error, requires_grad=False)
        corrected = self.reconstruction_loss()
        if corrected < loss:
            self.learned.corrected_biases[self.unit.layers[-1]] = part.bias
            return corrected
        part.bias = before
        return loss

    def loss(self) -> Tensor:
        """This process's share of the loss of the rows now chosen: one forward of the quantized unit."""
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
        if self.recipe.rounding_regularizer:
            total = total + self.pull * rounding_regularizer(up, self.beta)
        return total if self.share.is_whole else total * self.share.weight

    def _weigh_layers(self) -> list[float]:
        """gamma c_layer of every layer with a target; sizes are those of the first rows, the same for all processes."""
        gamma, targets = self.recipe.layer_loss_weight, list(self.data.layer_targets.values())
        if not self.recipe.relative_layer_losses:
            return [gamma] * len(targets)
        block = sum(map(_size, self.data.full_precision.outputs))
        return [gamma * block / max(_size(rows), _TINY) for rows in targets]

    def _inputs(self) -> list[Tensor]:
        """The quantized network's inputs, with elements of the full-precision ones mixed in."""
        quantized, exact = self.groups["inputs"], self.groups["exact"]
        if not exact:
            return quantized
        floating = [number for number, x in enumerate(exact) if x.is_floating_point()]
        chosen = floating[:1] if self.recipe.mixed_inputs == "hidden" else floating  # the hidden state comes first
        mixed = list(quantized)
        for number in chosen:
            mask = self.input_drop.mask(exact[number])
            if mask is not None:
                mixed[number] = torch.where(mask, exact[number], quantized[number])
        return mixed

    @torch.no_grad()
    def reconstruction_loss(self, decided: bool = True) -> float:
        """Returns the block loss over all rows of the partly quantized network's inputs, every activation quantized.

        Processes share the rows; the sum is the same however many they are.

        Args:
            decided: Whether h is rounded to 0 or 1, as it is deployed.
        """
        losses: dict[int, Tensor] = {}
        for number, count, outputs, targets in self._outputs(decided):
            each = [channel_loss(output, target) for output, target in zip(outputs, targets, strict=True)]
            losses[number] = count * torch.stack(each).sum()
        return float(self._summed(losses, ())) / self.data.quantized.rows

    @torch.no_grad()
    def _mean_error(self) -> Tensor:
        """The mean over rows and positions of target minus deployed output, with shape `(C_out,)`."""
        kind = self.data.full_precision.form.outputs[0]
        shape = kind.shape if kind.entries == 1 else kind.shape[1:]
        channels = shape[0] if len(shape) == 3 else shape[-1]
        sums: dict[int, Tensor] = {}
        for number, count, (output, *_), (target, *_) in self._outputs(decided=True):
            error = target - output
            sums[number] = count * error.movedim(1 if error.dim() == 4 else -1, 0).flatten(1).mean(dim=1)
        return (self._summed(sums, (channels,)) / self.data.quantized.rows).to(torch.float32)

    def _outputs(self, decided: bool) -> Iterator[tuple[int, int, list[Tensor], list[Tensor]]]:
        """Yields the outputs and targets of this process's part of the rows: number, rows, outputs, targets."""
        self.activation_drop.active, self.learned.decided = False, decided
        self.learned.materialize()
        calls, exact = self.data.quantized, self.data.full_precision
        parts = self._row_parts()
        for number in range(self.processes.index, len(parts), self.processes.count):
            places = parts[number]
            args, kwargs = exact.call(_on_device(calls.tensors, places, self.device))
            outputs = exact.outputs_of(self.module(*args, **kwargs))
            yield number, len(places), outputs, _on_device(exact.outputs, places, self.device)
        self.activation_drop.active, self.learned.decided = True, False

    def _row_parts(self) -> list[range]:
        return chunks(self.data.quantized.rows, max(self.recipe.batch_size, EVALUATED_ROWS))

    def _summed(self, values: Mapping[int, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The sum over all parts of the rows, float64: each process has some, and all add them up in one order."""
        table = torch.zeros((len(self._row_parts()), *shape), dtype=torch.float64, device=self.device)
        for number, value in values.items():
            table[number] = value
        self.processes.sum(table)
        return table.cpu().cumsum(dim=0)[-1]

    def set_iteration(self, iteration: int) -> None:
        """Chooses the rows of an iteration, the sharpness of h and the strength of the rounding regularizer."""
        self.rows = self._upcoming or self._draw()
        self._upcoming = self._draw() if iteration + 1 < self.recipe.iterations else None
        self.batch.load(self.rows, self._upcoming)
        start = _REGULARIZER_START * self.rounding_iterations
        progress = min(1.0, (iteration - start) / max(1.0, self.rounding_iterations - start))
        self.learned.rounding.sharpness.fill_(self._sharpness(iteration))
        self.pull.fill_(self.recipe.rounding_regularizer if progress >= 0 else 0.0)
        self.beta.fill_(_BETA_TO + (_BETA_FROM - _BETA_TO) * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0))))

    def _sharpness(self, iteration: int) -> float:
        """Returns tau at the beginning of an iteration; the last value belongs to the end of the last one."""
        recipe = self.recipe
        progress = min(1.0, iteration / max(1, self.rounding_iterations))
        return sharpness_at(progress, recipe.rounding_sharpness, recipe.rounding_sharpness_start)

    def _draw(self) -> list[int]:
        """Rows of the next step, drawn for all processes alike, of which this one takes its part."""
        rows = torch.randint(self.data.quantized.rows, (self.recipe.batch_size,), generator=self.order)
        return rows[self.share.start : self.share.stop].tolist()

    def optimization(self, phase: Phase | None = None) -> Optimization:
        """Returns Adam over what a phase learns, at the recipe's first steps; without one, over all."""
        phase = phase or Phase(0, self.recipe.iterations, rounding=True, scales=bool(self.learned.scales.names))
        rates: list[tuple[nn.Parameter, float]] = []
        if phase.rounding:
            rates.append((self.learned.rounding.alpha, self.recipe.weight_learning_rate))
        if phase.scales:
            rates.append((self.learned.scales.factor, self.recipe.activation_learning_rate))
        decays = self.recipe.rate_decay == "cosine"
        return Optimization(rates, max(1, phase.stop - phase.start), self.device, decays)


def _size(rows: Rows) -> float:
    """|x|^2 of the first rows, as `channel_loss` has it."""
    first = rows.kind.joined(rows.read(range(min(rows.count, EVALUATED_ROWS)))).float()
    return float(channel_loss(first, torch.zeros_like(first)))


def _on_device(group: Sequence[Rows], places: Sequence[int], device: torch.device) -> list[Tensor]:
    return [rows.kind.joined(rows.read(places).to(device)) for rows in group]
