"""Layers and attention while they learn: soft rounding, scales with gradients, activations dropped to full precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edadm_cli.quant.attention import OPERANDS, AttentionProducts, operand_grid
from edadm_cli.quant.grid import learned_fake_quantize
from edadm_cli.quant.layers import SplitLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import AttentionPlan, LayerPlan
from edadm_cli.quant.rounding import initial_alpha, rectified_sigmoid
from edadm_cli.reconstruct.ranges import part_names, split_channels

_DROP_LEVELS = 256


class Drop:
    """Random masks, true with a probability that is a multiple of 1/256 (one random byte an element).

    Args:
        probability: Share of true elements.
        generator: On the device of the masks.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self.level = round(probability * _DROP_LEVELS)
        self.generator = generator
        self.active = True

    def mask(self, x: Tensor) -> Tensor | None:
        """A mask of the shape of `x`; `None` when nothing is dropped."""
        if not self.active or self.level == 0:
            return None
        if self.level == _DROP_LEVELS:
            return torch.ones_like(x, dtype=torch.bool)
        words = torch.randint(
            -(2**63), 2**63 - 1, (-(-x.numel() // 8),), generator=self.generator, device=x.device, dtype=torch.int64
        )
        return (words.view(torch.uint8)[: x.numel()] < self.level).reshape(x.shape)


class LearnedLayer(nn.Module):
    """A layer whose rounding (`alpha`) and input scale are parameters; weight, weight scale and bias are fixed."""

    def __init__(
        self, layer: nn.Module, weight: Tensor, bias: Tensor | None, plan: LayerPlan, params: dict[str, Tensor], drop: Drop
    ) -> None:
        super().__init__()
        device = weight.device
        self.operation, self.plan, self.drop = Operation.of(layer), plan, drop
        self.weight, self.bias = weight.detach(), bias
        self.weight_scale = params["weight_scale"].to(device).reshape(-1, *[1] * (weight.dim() - 1))
        self.floor = (self.weight / self.weight_scale).floor()
        self.alpha = nn.Parameter(initial_alpha(self.weight, self.weight_scale))
        self.decided = False  # whether h is hardened to 0 or 1
        if plan.input_grid is not None:
            self.input_scale = nn.Parameter(params["input_scale"].to(device).reshape(()).clone())
            self.input_zero_point = params["input_zero_point"].to(device).reshape(())

    def forward(self, x: Tensor) -> Tensor:
        if self.plan.input_grid is not None:
            dropped = self.drop.mask(x)
            x = learned_fake_quantize(x, self.input_scale, self.input_zero_point, self.plan.input_grid, dropped)
        return self.operation(x, self.codes() * self.weight_scale, self.bias)

    def codes(self) -> Tensor:
        """The weight's codes: between floor and ceiling while learning, whole once decided."""
        grid = self.plan.weight_grid
        up = self.alpha.detach() >= 0 if self.decided else rectified_sigmoid(self.alpha)
        return (self.floor + up).clamp(grid.quant_min, grid.quant_max)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What was learned under the names of the artifact, on the CPU; the rounding must have been decided."""
        found = {"weight_int": self.codes().to(torch.int8), "weight_scale": self.weight_scale.flatten()}
        if self.plan.input_grid is not None:
            found |= {"input_scale": self.input_scale.detach(), "input_zero_point": self.input_zero_point}
        return {name: tensor.cpu() for name, tensor in found.items()}


class LearnedAttention(AttentionProducts):
    """Attention products whose four scales are parameters."""

    def __init__(self, plan: AttentionPlan, scales: dict[str, Tensor], drop: Drop, device: torch.device) -> None:
        super().__init__()
        self.plan, self.drop = plan, drop
        self.scales = nn.ParameterDict({o: nn.Parameter(scales[o].to(device).reshape(()).clone()) for o in OPERANDS})

    def touch(self, operand: str, tensor: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int32, device=tensor.device)
        grid = operand_grid(self.plan, operand)
        return learned_fake_quantize(tensor, self.scales[operand], zero, grid, self.drop.mask(tensor))

    def parameters_by_name(self) -> dict[str, Tensor]:
        return {f"{operand}_scale": self.scales[operand].detach().cpu() for operand in OPERANDS}


def learned_layer(
    name: str, layer: nn.Module, plan: LayerPlan, params: Mapping[str, Tensor], drop: Drop
) -> tuple[nn.Module, dict[str, LearnedLayer]]:
    """The module that stands for `layer` while its unit learns, and its quantized parts by artifact name."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    parts: dict[str, LearnedLayer] = {}
    for part, piece in zip(part_names(name, plan), split_channels(weight.detach(), plan, 1), strict=True):
        own = {key: params[f"{part}.{key}"] for key in _own_keys(part, params)}
        part_bias = bias.detach() if isinstance(bias, Tensor) and not parts else None
        parts[part] = LearnedLayer(layer, piece, part_bias, plan.part(), own, drop)
    if plan.channel_parts is None:
        return parts[name], parts
    return SplitLayer(list(parts.values()), plan.channel_parts, Operation.of(layer).channel_dim), parts


def _own_keys(name: str, params: Mapping[str, Tensor]) -> list[str]:
    keys = ("weight_scale", "input_scale", "input_zero_point")
    return [key for key in keys if f"{name}.{key}" in params]
