"""Layers, attention, rounding and scales while a unit learns.

What is learned lies flat: one tensor of rounding variables and one of scales for the whole unit, so that a step costs a
few operations on long tensors instead of many on short ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.ranges import folded, transform_tensors
from edadm_cli.processes import Processes
from edadm_cli.quant.attention import OPERANDS, AttentionProducts, operand_grid
from edadm_cli.quant.grid import learned_fake_quantize
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.layers import SplitLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import AttentionPlan, LayerPlan
from edadm_cli.quant.rounding import initial_alpha, rectified_sigmoid
from edadm_cli.quant.transforms import transform_named

_DROP_LEVELS = 256
_SMALLEST_SHARE = 1e-2


@dataclass(frozen=True)
class Share:
    """The rows of every step that one process takes: `start` to `stop` of `total`."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, batch_size: int, processes: Processes) -> Share:
        """Parts of nearly equal size, one a process."""
        bounds = [round(batch_size * index / processes.count) for index in (processes.index, processes.index + 1)]
        return cls(bounds[0], bounds[1], batch_size)

    @property
    def size(self) -> int:
        """Rows of this process."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether one process takes all rows."""
        return self.size == self.total

    @property
    def weight(self) -> float:
        """What this process's mean over its rows counts in the mean over all."""
        return self.size / self.total


def round_level(probability: float) -> int:
    """Returns a probability in multiples of 1/256, as `Drop` takes it."""
    return round(probability * _DROP_LEVELS)


class Drop:
    """Random masks, true with a probability that is a multiple of 1/256 (one random byte an element).

    Args:
        probability: Share of true elements.
        generator: On the device of the masks.
        share: Rows that are here. Masks are drawn for those of all processes, so that their number changes no mask.
    """

    def __init__(self, probability: float, generator: torch.Generator, share: Share) -> None:
        self.level = round_level(probability)
        self.generator, self.share = generator, share
        self.active = True

    def mask(self, x: Tensor) -> Tensor | None:
        """A mask of the shape of `x`; `None` when nothing is dropped."""
        if not self.active or self.level == 0:
            return None
        if self.level == _DROP_LEVELS:
            return torch.ones_like(x, dtype=torch.bool)
        a_row = x.numel() // self.share.size
        words = torch.randint(
            -(2**63),
            2**63 - 1,
            (-(-a_row * self.share.total // 8),),
            generator=self.generator,
            device=x.device,
            dtype=torch.int64,
        )
        own = words.view(torch.uint8)[a_row * self.share.start : a_row * self.share.stop]
        return (own < self.level).reshape(x.shape)


class LearnedLayer(nn.Module):
    """A layer, or one channel part of it, whose weight and input scale are set before every forward."""

    weight: Tensor
    input_scale: Tensor

    def __init__(
        self,
        operation: Operation,
        plan: LayerPlan,
        bias: Tensor | None,
        zero_point: Tensor | None,
        drop: Drop,
        transform_tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.operation, self.plan, self.bias, self.drop = operation, plan, bias, drop
        self.input_zero_point, self.transform_tensors = zero_point, transform_tensors
        self.transform = None if plan.transform is None else transform_named(plan.transform)

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """How the input becomes codes, with the scale that is learned; `None` where it stays in floating point."""
        grid = self.plan.input_grid
        if grid is None:
            return None
        assert self.input_zero_point is not None
        dim = self.operation.channel_dim
        return InputQuantizer(
            grid, self.input_scale, self.input_zero_point, dim, self.transform, self.transform_tensors
        )

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input, but for what is dropped, and multiply."""
        quantizer = self.input_quantizer
        if quantizer is not None:
            x = quantizer.learned(x, self.drop.mask(x))
        return self.operation(x, self.weight, self.bias)


class LearnedAttention(AttentionProducts):
    """Attention products whose four scales are set before every forward."""

    def __init__(self, plan: AttentionPlan, drop: Drop) -> None:
        super().__init__()
        self.plan, self.drop = plan, drop
        self.scales: dict[str, Tensor] = {}

    def touch(self, operand: str, tensor: Tensor) -> Tensor:
        """Quantize an operand, but for what is dropped."""
        zero = torch.zeros((), dtype=torch.int32, device=tensor.device)
        grid = operand_grid(self.plan, operand)
        return learned_fake_quantize(tensor, self.scales[operand], zero, grid, self.drop.mask(tensor))


class LearnedRounding:
    """AdaRound's variables of all weights of a unit, as one tensor.

    Args:
        weights: Full-precision weights by part name.
        scales: Their scales, `[C_out]` each.
        plans: Their bits.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], plans: Mapping[str, LayerPlan]
    ) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.sizes = [weight.numel() for weight in weights.values()]
        flat = torch.cat([weight.flatten() for weight in weights.values()])
        self.scale = torch.cat(
            [scales[name].to(flat).repeat_interleave(weight[0].numel()) for name, weight in weights.items()]
        )
        self.floor = (flat / self.scale).floor()
        grids = [plans[name].weight_grid for name in weights]
        self.low = self._per_element([grid.quant_min for grid in grids], flat)
        self.high = self._per_element([grid.quant_max for grid in grids], flat)
        self.alpha = nn.Parameter(initial_alpha(flat, self.scale))
        self.sharpness = torch.ones((), device=flat.device)  # tau, in place, so that a CUDA graph reads its new value

    def weights(self, decided: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the weights by part name, differentiable in alpha unless decided, and h, flat."""
        up = (self.alpha.detach() >= 0).float() if decided else rectified_sigmoid(self.alpha, self.sharpness)
        return self._split((self.floor + up).clamp(self.low, self.high) * self.scale), up

    def codes(self) -> dict[str, Tensor]:
        """Decided codes by part name, int8: up where h >= 0.5."""
        codes = (self.floor + (self.alpha.detach() >= 0)).clamp(self.low, self.high)
        return self._split(codes.to(torch.int8))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _per_element(self, bounds: list[int], like: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=like.device)
        return torch.tensor(bounds, device=like.device, dtype=like.dtype).repeat_interleave(sizes)


class LearnedScales:
    """All activation scales of a unit, as one tensor.

    Args:
        first: Initial scales by name.
        relative: Whether a step is a share of each scale's first value, or an absolute number.
        device: Where they live.
    """

    def __init__(self, first: Mapping[str, Tensor], relative: bool, device: torch.device) -> None:
        self.names = list(first)
        values = torch.stack([scale.reshape(()) for scale in first.values()]) if first else torch.zeros(0)
        values = values.to(device)
        self.unit = values if relative else torch.ones_like(values)
        self.factor = nn.Parameter(values / self.unit)
        self.smallest = self.factor.detach() * _SMALLEST_SHARE

    def values(self) -> dict[str, Tensor]:
        """Scales by name, differentiable in `factor`."""
        return dict(zip(self.names, (self.factor * self.unit).unbind(), strict=True))

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Let no step take a scale below a hundredth of its first value."""
        self.factor.clamp_(min=self.smallest)


class LearnedUnit:
    """The learnable stand-ins of one unit's layers and attentions, and what they learn."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        plans: Mapping[str, LayerPlan],
        attentions: Mapping[str, AttentionPlan],
        params: Mapping[str, Tensor],
        drop: Drop,
        relative_scales: bool,
    ) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.attentions = {name: LearnedAttention(plan, drop) for name, plan in attentions.items()}
        self.decided = False
        self.corrected_biases: dict[str, Tensor] = {}
        self._parts: dict[str, LearnedLayer] = {}
        self._parts_of = {name: plans[name].part_names(name) for name in layers}
        weights: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weights |= self._add_layer(name, layer, plans[name], params, drop)
        device = next(iter(weights.values())).device
        self._weight_scales = {name: params[f"{name}.weight_scale"] for name in weights}
        self.rounding = LearnedRounding(
            weights, self._weight_scales, {name: part.plan for name, part in self._parts.items()}
        )
        named = [f"{name}.input_scale" for name, part in self._parts.items() if part.plan.input_grid is not None]
        named += [f"{name}.{operand}_scale" for name in attentions for operand in OPERANDS]
        self.scales = LearnedScales({name: params[name] for name in named}, relative_scales, device)

    def materialize(self) -> Tensor:
        """Give every stand-in its weight and scales for the next forward; returns h, flat."""
        weights, up = self.rounding.weights(self.decided)
        scales = self.scales.values()
        for name, part in self._parts.items():
            part.weight = weights[name]
            if part.plan.input_grid is not None:
                part.input_scale = scales[f"{name}.input_scale"]
        for name, attention in self.attentions.items():
            attention.scales = {operand: scales[f"{name}.{operand}_scale"] for operand in OPERANDS}
        return up

    def last_part(self, layer: str) -> LearnedLayer:
        """Returns the stand-in that holds a layer's bias: the layer's own, or that of its first channel part."""
        return self._parts[self._parts_of[layer][0]]

    def params(self) -> dict[str, Tensor]:
        """What was learned, rounding decided, under the names of the artifact, on the CPU."""
        found = {f"{name}.weight_int": codes for name, codes in self.rounding.codes().items()}
        found |= {f"{name}.weight_scale": scale for name, scale in self._weight_scales.items()}
        found |= {f"{self._parts_of[name][0]}.bias": bias.detach() for name, bias in self.corrected_biases.items()}
        found |= {name: scale.detach() for name, scale in self.scales.values().items()}
        for name, part in self._parts.items():
            if part.input_zero_point is not None:
                found[f"{name}.input_zero_point"] = part.input_zero_point
            found |= {f"{name}.{key}": tensor for key, tensor in part.transform_tensors.items()}
        return {name: tensor.cpu().clone() for name, tensor in found.items()}

    def _add_layer(
        self, name: str, layer: nn.Module, plan: LayerPlan, params: Mapping[str, Tensor], drop: Drop
    ) -> dict[str, Tensor]:
        weight, operation = layer.weight, Operation.of(layer)
        assert isinstance(weight, Tensor)
        names, part_plan, rounded = plan.part_names(name), plan.part(), {}
        for part, piece in zip(names, plan.split(weight.detach()), strict=True):
            zero_point = params.get(f"{part}.input_zero_point")
            tensors = {} if plan.transform is None else transform_tensors(transform_named(plan.transform), part, params)
            rounded[part] = folded(piece, part, plan, params)
            self._parts[part] = LearnedLayer(
                operation,
                part_plan,
                layer.bias if part == names[0] and isinstance(layer.bias, Tensor) else None,
                None if zero_point is None else zero_point.to(weight.device).reshape(()),
                drop,
                {key: tensor.to(weight.device) for key, tensor in tensors.items()},
            )
        stand_ins: list[nn.Module] = [self._parts[part] for part in names]
        is_split = plan.channel_parts is not None
        self.modules[name] = (
            SplitLayer(stand_ins, plan.channel_parts or (), operation.channel_dim) if is_split else stand_ins[0]
        )
        return rounded
