"""Layers of every kind with random codes, for the tests of the graph engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan


def _conv(channels: int, out: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, **{"kernel_size": 3, "padding": 1, **kwargs})


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (_conv(5, 7), (2, 5, 9, 11)),
    "stride": (_conv(16, 24, stride=2), (2, 16, 9, 8)),
    "padded outside": (_conv(16, 8, stride=2, padding=0), (1, 16, 9, 9)),
    "padded unevenly": (_conv(4, 6, padding=(2, 0)), (1, 4, 5, 6)),
    "pointwise, no bias": (_conv(32, 16, kernel_size=1, padding=0, bias=False), (1, 32, 5, 5)),
    "groups": (_conv(6, 9, groups=3), (2, 6, 7, 7)),
    "dilation": (_conv(3, 4, dilation=2, padding=2), (2, 3, 9, 9)),
    "linear": (nn.Linear(13, 5), (7, 13)),
    "tokens, no bias": (nn.Linear(32, 48, bias=False), (2, 6, 32)),
}


def filled(
    name: str, plan: LayerPlan, zero_point: int | None = None, input_scale: float | None = None
) -> QuantizedLayer:
    """Returns a layer with random codes and scales; by default its inputs are about between -1 and 2."""
    layer = quantized_layer(LAYERS[name][0], plan)
    assert isinstance(layer, QuantizedLayer)
    generator, grid = torch.Generator().manual_seed(len(name)), plan.weight_grid
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, layer.weight_shape, generator=generator)
    scales = torch.rand(layer.weight_shape[0], generator=generator) * 0.02 + 0.001
    if plan.input_grid is None:
        layer.set_parameters(codes, scales)
        return layer
    largest = plan.input_grid.quant_max
    zero = torch.tensor(largest // 3 if zero_point is None else zero_point, dtype=torch.int32)
    layer.set_parameters(codes, scales, torch.tensor(input_scale or 3.0 / largest), zero)
    return layer
