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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.units import Unit
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.rounding import rounding_regularizer
from edadm_cli.reconstruct.capture import UnitCalls, flatten, layer_outputs
from edadm_cli.reconstruct.learned import Drop, LearnedAttention, LearnedLayer, learned_layer
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.hyperparameters import Hyperparameters

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
    """|output - target|^2: summed over channels (dimension 1 of `[N, C, H, W]`, else the last), averaged over the rest."""
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
        self.layers: dict[str, LearnedLayer] = {}
        self.attentions: dict[str, LearnedAttention] = {}
        for name in unit.layers:
            module, parts = learned_layer(name, network.float_layers[name], plan.layers[name], params, self.activation_drop)
            network.put_layer(name, module)
            self.layers |= parts
        for name in unit.attentions:
            if name in plan.attentions:
                scales = {operand: params[f"{name}.{operand}_scale"] for operand in "qkvp"}
                learned = LearnedAttention(plan.attentions[name], scales, self.activation_drop, self.device)
                network.put_processor(name, learned)
                self.attentions[name] = learned
        # A unit of one layer is that layer's replacement, a block is the module around its layers.
        self.module: nn.Module = network.denoiser.get_submodule(unit.name)

    def learn(self, advance: Callable[[int], None] = lambda _: None) -> UnitResult:
        """Run the optimizer and decide the rounding.

        Raises:
            InputError: The loss is not finite.
        """
        self._decide(True)
        before = self.reconstruction_loss()  # h starts at the dropped fraction, so this rounds to nearest
        self._decide(False)
        optimizer, schedule = self._optimizer()
        every = max(1, self.recipe.iterations // _CURVE_POINTS)
        curve: list[float] = []
        initial = [scale.detach().clone() for scale in self._scales()]
        for iteration in range(self.recipe.iterations):
            optimizer.zero_grad(set_to_none=True)
            loss = self.step_loss(iteration)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for scale, start in zip(self._scales(), initial, strict=True):
                    scale.clamp_(min=start * 1e-2)
            if iteration % every == 0:
                curve.append(loss.item())
            advance(1)
        self._decide(True)
        after = self.reconstruction_loss()
        if not math.isfinite(after):
            raise InputError(
                f"The reconstruction loss of '{self.unit.name}' is not finite.",
                hint="lower weight_learning_rate or activation_learning_rate in the recipe",
            )
        return UnitResult(self.params(), before, after, curve)

    def step_loss(self, iteration: int) -> Tensor:
        """The loss of one random batch: one forward of the quantized unit."""
        rows = torch.randint(self.data.full_precision.rows, (self.recipe.batch_size,), generator=self.order)
        rows = rows.to(self.device)
        mixed = []
        for exact, quantized in zip(self.data.full_precision.tensors, self.data.quantized.tensors, strict=True):
            mask = self.input_drop.mask(exact[rows]) if exact.is_floating_point() else None
            mixed.append(quantized[rows] if mask is None else torch.where(mask, exact[rows], quantized[rows]))
        names = list(self.data.layer_targets or ())
        args, kwargs = self.data.full_precision.call(mixed)
        with layer_outputs(self.network.denoiser, names) as inner:
            outputs = _tensors(self.module(*args, **kwargs), len(rows))
        targets = [target[rows] for target in self.data.full_precision.outputs]
        loss = sum((channel_loss(o, t) for o, t in zip(outputs, targets, strict=True)), torch.zeros((), device=self.device))
        if self.data.layer_targets:
            inner_losses = [channel_loss(inner[name], self.data.layer_targets[name][rows]) for name in names]
            loss = loss + self.recipe.layer_loss_weight * torch.stack(inner_losses).sum()
        if self.recipe.rounding_regularizer and iteration >= _REGULARIZER_START * self.recipe.iterations:
            loss = loss + self.recipe.rounding_regularizer * self._regularizer(iteration)
        return loss

    @torch.no_grad()
    def reconstruction_loss(self) -> float:
        """The block loss on the partly quantized network's inputs with every activation quantized, all rows."""
        was_active, self.activation_drop.active = self.activation_drop.active, False
        total, calls = 0.0, self.data.quantized
        size = max(self.recipe.batch_size, 64)
        for start in range(0, calls.rows, size):
            args, kwargs = calls.call([tensor[start : start + size] for tensor in calls.tensors])
            rows = min(size, calls.rows - start)
            outputs = _tensors(self.module(*args, **kwargs), rows)
            targets = [target[start : start + size] for target in self.data.full_precision.outputs]
            total += rows * sum(channel_loss(o, t).item() for o, t in zip(outputs, targets, strict=True))
        self.activation_drop.active = was_active
        return total / calls.rows

    def params(self) -> dict[str, Tensor]:
        """Everything learned, under the names of the artifact."""
        owners = {**self.layers, **self.attentions}
        return {f"{name}.{key}": t for name, owner in owners.items() for key, t in owner.parameters_by_name().items()}

    def _scales(self) -> list[nn.Parameter]:
        layers = [layer.input_scale for layer in self.layers.values() if layer.plan.input_grid is not None]
        return layers + [scale for attention in self.attentions.values() for scale in attention.scales.values()]

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        recipe = self.recipe
        groups: list[dict[str, object]] = [
            {"params": [layer.alpha for layer in self.layers.values()], "lr": recipe.weight_learning_rate}
        ]
        for scale in self._scales():
            unit_step = scale.item() if recipe.relative_scale_steps else 1.0
            groups.append({"params": [scale], "lr": recipe.activation_learning_rate * unit_step})
        optimizer = torch.optim.Adam(groups)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, recipe.iterations))

    def _regularizer(self, iteration: int) -> Tensor:
        start = _REGULARIZER_START * self.recipe.iterations
        progress = (iteration - start) / max(1.0, self.recipe.iterations - start)
        beta = _BETA_TO + (_BETA_FROM - _BETA_TO) * 0.5 * (1 + math.cos(math.pi * progress))
        return torch.stack([rounding_regularizer(layer.alpha, beta) for layer in self.layers.values()]).sum()

    def _decide(self, decided: bool) -> None:
        for layer in self.layers.values():
            layer.decided = decided


def _tensors(output: object, rows: int) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(output, tensors, rows)
    return tensors
