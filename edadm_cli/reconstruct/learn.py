r"""Fine-grained block reconstruction of one unit.

    input   = x~ with probability 0.5 elementwise, else x          (QDrop)
    L_block = |out_q - out_fp|^2
    L       = L_block + gamma * sum over layers but the last of |layer_q - layer_fp|^2

with |.|^2 the squared error summed over channels and averaged over the rest. One quantized forward an iteration gives
every term; the full-precision targets are computed once.

References:
    EDA-DM, arXiv 2401.04585, section 4.2; AdaRound, arXiv 2004.10568; QDrop, arXiv 2203.05740; LSQ, arXiv 1902.08153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.units import Unit
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.rounding import rounding_regularizer
from edadm_cli.reconstruct.capture import UnitCalls, flatten, layer_outputs
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.learned import Drop, LearnedUnit
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.optimization import Optimization, make_step

_CURVE_POINTS = 50
_REGULARIZER_START = 0.2
_BETA_FROM, _BETA_TO = 20.0, 2.0


@dataclass
class UnitData:
    """What one unit learns from: rows of inputs and targets."""

    full_precision: UnitCalls
    quantized: UnitCalls
    layer_targets: dict[str, Tensor] | None


@dataclass
class UnitResult:
    """What one unit learned."""

    params: dict[str, Tensor]
    loss_before: float
    loss_after: float
    curve: list[float] = field(default_factory=list)


def channel_loss(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2, summed over channels (dimension 1 of `[N, C, H, W]`, else the last), averaged else."""
    channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
    return torch.nn.functional.mse_loss(output, target) * channels


def layer_targets(
    network: SwitchableNetwork, unit: Unit, names: Sequence[str], calls: UnitCalls, batch_size: int
) -> dict[str, Tensor]:
    """Full-precision outputs of the named layers of a unit over all of its calls, `[rows, ...]` each."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    with network.full_precision(), layer_outputs(network.denoiser, names) as outputs, torch.no_grad():
        for start in range(0, calls.rows, batch_size):
            args, kwargs = calls.call([tensor[start : start + batch_size] for tensor in calls.tensors])
            unit.module(*args, **kwargs)
            for name in names:
                pieces[name].append(outputs[name])
    return {name: torch.cat(parts) for name, parts in pieces.items()}


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
    ) -> None:
        self.network, self.unit, self.data, self.recipe = network, unit, data, recipe
        self.device = data.full_precision.tensors[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.activation_drop = Drop(recipe.activation_drop, self.generator)
        self.input_drop = Drop(recipe.input_drop, self.generator)
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
        self.rows = torch.zeros(recipe.batch_size, dtype=torch.int64, device=self.device)
        self.pull, self.beta = torch.zeros((), device=self.device), torch.ones((), device=self.device)
        # A unit of one layer is that layer's stand-in, a block is the module around its layers.
        self.module: nn.Module = network.denoiser.get_submodule(unit.name)

    def learn(self) -> UnitResult:
        """Run the optimizer and decide the rounding.

        Raises:
            InputError: The loss is not finite.
        """
        before = self.reconstruction_loss()  # h starts at the dropped fraction, so deciding now rounds to nearest
        step = make_step(self, self._optimization())
        every = max(1, self.recipe.iterations // _CURVE_POINTS)
        curve: list[float] = []
        for iteration in range(self.recipe.iterations):
            self.set_iteration(iteration)
            loss = step()
            if iteration % every == 0:
                curve.append(loss.item())
        after = self.reconstruction_loss()
        if not math.isfinite(after):
            raise InputError(
                f"The reconstruction loss of '{self.unit.name}' is not finite.",
                hint="lower weight_learning_rate or activation_learning_rate in the recipe",
            )
        return UnitResult(self.learned.params(), before, after, curve)

    def loss(self) -> Tensor:
        """The loss of the rows now chosen: one forward of the quantized unit."""
        rows, up = self.rows, self.learned.materialize()
        mixed = []
        for exact, quantized in zip(self.data.full_precision.tensors, self.data.quantized.tensors, strict=True):
            mask = self.input_drop.mask(exact[rows]) if exact.is_floating_point() else None
            mixed.append(quantized[rows] if mask is None else torch.where(mask, exact[rows], quantized[rows]))
        names = list(self.data.layer_targets or ())
        args, kwargs = self.data.full_precision.call(mixed)
        with layer_outputs(self.network.denoiser, names) as inner:
            outputs = _tensors(self.module(*args, **kwargs), len(rows))
        targets = self.data.full_precision.outputs
        total = torch.stack([channel_loss(o, t[rows]) for o, t in zip(outputs, targets, strict=True)]).sum()
        if self.data.layer_targets:
            inner_losses = [channel_loss(inner[name], self.data.layer_targets[name][rows]) for name in names]
            total = total + self.recipe.layer_loss_weight * torch.stack(inner_losses).sum()
        if self.recipe.rounding_regularizer:
            total = total + self.pull * rounding_regularizer(up, self.beta)
        return total

    @torch.no_grad()
    def reconstruction_loss(self) -> float:
        """The block loss as deployed, over all rows of the partly quantized network's inputs.

        Rounding is decided and every activation quantized.
        """
        self.activation_drop.active, self.learned.decided = False, True
        self.learned.materialize()
        total, calls = 0.0, self.data.quantized
        size = max(self.recipe.batch_size, 64)
        for start in range(0, calls.rows, size):
            args, kwargs = calls.call([tensor[start : start + size] for tensor in calls.tensors])
            rows = min(size, calls.rows - start)
            outputs = _tensors(self.module(*args, **kwargs), rows)
            targets = [target[start : start + size] for target in self.data.full_precision.outputs]
            total += rows * sum(channel_loss(o, t).item() for o, t in zip(outputs, targets, strict=True))
        self.activation_drop.active, self.learned.decided = True, False
        return total / calls.rows

    def set_iteration(self, iteration: int) -> None:
        """Choose the rows of an iteration and the strength of the rounding regularizer."""
        num_rows = self.data.full_precision.rows
        self.rows.copy_(torch.randint(num_rows, (self.recipe.batch_size,), generator=self.order))
        start = _REGULARIZER_START * self.recipe.iterations
        progress = (iteration - start) / max(1.0, self.recipe.iterations - start)
        self.pull.fill_(self.recipe.rounding_regularizer if progress >= 0 else 0.0)
        self.beta.fill_(_BETA_TO + (_BETA_FROM - _BETA_TO) * 0.5 * (1 + math.cos(math.pi * max(progress, 0.0))))

    def _optimization(self) -> Optimization:
        rates: list[tuple[nn.Parameter, float]] = [(self.learned.rounding.alpha, self.recipe.weight_learning_rate)]
        if self.learned.scales.names:
            rates.append((self.learned.scales.factor, self.recipe.activation_learning_rate))
        return Optimization(rates, max(1, self.recipe.iterations), self.device)


def _tensors(output: object, rows: int) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(output, tensors, rows)
    return tensors
