"""The layers and attention products of a unit while it learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.transforming import folded, transform_tensors
from edadm_cli.processes import Processes
from edadm_cli.quant.attention import OPERANDS, AttentionProducts, operand_grid
from edadm_cli.quant.grid import learned_fake_quantize
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import AttentionPlan, LayerPlan
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.quant.transforms import transform_named
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.learned_values import (
    LearnedRounding,
    LearnedScales,
    LearnedVectors,
    LearnedWeights,
    StraightThroughCodes,
)

_DROP_LEVELS = 256


@dataclass(frozen=True)
class Share:
    """The rows of every step that one process takes: `start` to `stop` of `total`."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, batch_size: int, processes: Processes) -> Share:
        """Returns this process's part of the rows; all parts have nearly the same size."""
        bounds = [round(batch_size * index / processes.count) for index in (processes.index, processes.index + 1)]
        return cls(bounds[0], bounds[1], batch_size)

    @property
    def size(self) -> int:
        """Number of rows of this process."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether one process takes all rows."""
        return self.size == self.total

    @property
    def weight(self) -> float:
        """Weight of this process's mean in the mean over all rows."""
        return self.size / self.total


def round_level(probability: float) -> int:
    """Returns a probability rounded to a multiple of 1/256, as `Drop` takes it."""
    return round(probability * _DROP_LEVELS)


class Drop:
    """Random masks whose elements are true with a probability in multiples of 1/256 (one random byte per element).

    Args:
        probability: Share of true elements.
        generator: The random generator, on the device of the masks.
        share: The rows of this process. Masks are generated for the rows of all processes, so that their number
            does not change them.
    """

    def __init__(self, probability: float, generator: torch.Generator, share: Share) -> None:
        self.level = round_level(probability)
        self.generator, self.share = generator, share
        self.active = True

    def mask(self, x: Tensor) -> Tensor | None:
        """Returns a boolean mask with the shape of `x`; `None` if nothing is dropped."""
        if not self.active or self.level == 0:
            return None
        if self.level == _DROP_LEVELS:
            return torch.ones_like(x, dtype=torch.bool)
        a_row = -(-x.numel() // self.share.size)  # more than a row where `x` has none, such as a shared embedding
        words = torch.randint(
            -(2**63),
            2**63 - 1,
            (-(-a_row * self.share.total // 8),),
            generator=self.generator,
            device=x.device,
            dtype=torch.int64,
        )
        random_bytes = words.view(torch.uint8)[a_row * self.share.start :][: x.numel()]
        return (random_bytes < self.level).reshape(x.shape)


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
        # Blocks of Kandinsky 6 ask a layer's parameters and buffers for its element type, and there are no others.
        self.register_buffer("element_type", torch.zeros((), device=drop.generator.device), persistent=False)

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """The quantizer of the input, with the learned scale; `None` if the input is left in float."""
        grid = self.plan.input_grid
        if grid is None:
            return None
        assert self.input_zero_point is not None
        dim = self.operation.channel_dim
        return InputQuantizer(
            grid, self.input_scale, self.input_zero_point, dim, self.transform, self.transform_tensors
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output for an input that is quantized except for its dropped elements."""
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

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """Quantizes an operand except for its dropped elements."""
        zero = torch.zeros((), dtype=torch.int32, device=tensor.device)
        grid = operand_grid(self.plan, operand)
        return learned_fake_quantize(tensor, self.scales[operand], zero, grid, self.drop.mask(tensor))


class LearnedUnit:
    """The learnable replacements of one unit's layers and attentions, with their learned values.

    Args:
        layers: The layers in full precision, by name.
        plans: Their bits.
        attentions: The bits of the attention products, by the name of the attention module.
        params: The ranges that were searched, under the names of the artifact.
        drop: Decides which activations are left unquantized while learning.
        hyperparameters: The numbers of the optimization.
        learned: The parameters that were learned before, where learning goes on from them; `None` to begin from
            nearest rounding and the searched ranges.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        plans: Mapping[str, LayerPlan],
        attentions: Mapping[str, AttentionPlan],
        params: Mapping[str, Tensor],
        drop: Drop,
        hyperparameters: Hyperparameters,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        first = params if learned is None else learned
        self.modules: dict[str, nn.Module] = {}
        self.attentions = {name: LearnedAttention(plan, drop) for name, plan in attentions.items()}
        self.decided = False
        self._parts: dict[str, LearnedLayer] = {}
        weights: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weights |= self._add_layer(name, layer, plans[name], params, first, drop)
        device = next(iter(weights.values())).device
        self._weight_scales = {name: params[f"{name}.weight_scale"] for name in weights}
        self._biases = {
            name: first.get(f"{name}.bias", part.bias).to(device).detach()
            for name, part in self._parts.items()
            if part.bias is not None
        }
        plan_of_part = {name: part.plan for name, part in self._parts.items()}
        grouped = [name for name, part in plan_of_part.items() if part.group_size is not None]
        self._multipliers = {name: params[f"{name}.weight_multiplier"] for name in grouped}
        parts = (weights, self._weight_scales, plan_of_part, self._multipliers)
        if learned is None:
            self.rounding: LearnedWeights = LearnedRounding(*parts)
        else:
            self.rounding = StraightThroughCodes(*parts, {name: learned[f"{name}.weight_int"] for name in weights})
        named = [f"{name}.input_scale" for name, part in self._parts.items() if part.plan.input_grid is not None]
        named += [f"{name}.{operand}_scale" for name in attentions for operand in OPERANDS]
        relative = hyperparameters.relative_scale_steps
        self.scales = LearnedScales({name: first[name] for name in named}, relative, device)
        self.vectors = self._vectors(weights, hyperparameters.channel_values, device, first)

    def _vectors(
        self,
        weights: Mapping[str, Tensor],
        kinds: Collection[str],
        device: torch.device,
        params: Mapping[str, Tensor],
    ) -> LearnedVectors:
        """Returns the learned values per channel; the unit of a bias is the norm of its row of the weight."""
        first: dict[str, Tensor] = {}
        units: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            if "weight-scale" in kinds:
                first[f"{name}.weight_scale"] = params[f"{name}.weight_scale"]
            if "bias" in kinds and name in self._biases:
                first[f"{name}.bias"] = self._biases[name]
                units[f"{name}.bias"] = weights[name].detach().flatten(1).norm(dim=1)
            if "input-channel-scale" in kinds:
                first |= {f"{name}.{key}": tensor for key, tensor in part.transform_tensors.items()}
        return LearnedVectors(first, units, device)

    def materialize(self) -> Tensor:
        """Sets the weight, bias and scales of every layer for the next forward; returns h as a flat tensor."""
        vectors, scales = self.vectors.values(), self.scales.values()
        keys = {name: f"{name}.weight_scale" for name in self._parts}
        learned = {name: vectors[key] for name, key in keys.items() if key in vectors}
        weights, up = self.rounding.weights(self.decided, learned or None)
        for name, part in self._parts.items():
            part.weight = weights[name]
            if name in self._biases:
                part.bias = vectors.get(f"{name}.bias", self._biases[name])
            if part.plan.input_grid is not None:
                part.input_scale = scales[f"{name}.input_scale"]
            part.transform_tensors = {
                key: vectors.get(f"{name}.{key}", tensor) for key, tensor in part.transform_tensors.items()
            }
        for name, attention in self.attentions.items():
            attention.scales = {operand: scales[f"{name}.{operand}_scale"] for operand in OPERANDS}
        return up

    def keep_in_range(self) -> None:
        """Restores positive scales and codes on their grid after the optimizer has changed them."""
        self.rounding.keep_in_range()
        self.scales.keep_positive()
        self.vectors.keep_positive()

    @torch.no_grad()
    def params(self) -> dict[str, Tensor]:
        """Returns the learned parameters with decided rounding, under the names of the artifact, on the CPU."""
        vectors = self.vectors.values()
        params = {f"{name}.weight_int": codes for name, codes in self.rounding.codes().items()}
        params |= {f"{name}.weight_scale": scale for name, scale in self._weight_scales.items()}
        params |= {f"{name}.weight_multiplier": factors for name, factors in self._multipliers.items()}
        params |= self.scales.values()
        for name, part in self._parts.items():
            if part.input_zero_point is not None:
                params[f"{name}.input_zero_point"] = part.input_zero_point
            params |= {f"{name}.{key}": tensor for key, tensor in part.transform_tensors.items()}
        params |= vectors
        return {name: tensor.detach().cpu().clone() for name, tensor in params.items()}

    def _add_layer(
        self,
        name: str,
        layer: nn.Module,
        plan: LayerPlan,
        params: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        drop: Drop,
    ) -> dict[str, Tensor]:
        """Adds a layer, part by part; returns the weights that are rounded, by part name."""
        weight, operation = layer.weight, Operation.of(layer)
        assert isinstance(weight, Tensor)
        names, part_plan, rounded = plan.part_names(name), plan.part(), {}
        for part, piece in zip(names, plan.split(weight.detach()), strict=True):
            zero_point = params.get(f"{part}.input_zero_point")
            tensors = {} if plan.transform is None else transform_tensors(transform_named(plan.transform), part, first)
            rounded[part] = folded(piece, part, plan, params)
            self._parts[part] = LearnedLayer(
                operation,
                part_plan,
                layer.bias.detach() if part == names[0] and isinstance(layer.bias, Tensor) else None,
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
