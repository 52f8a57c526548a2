"""Quantized operations as OpenVINO nodes, in the patterns that its low-precision transformations turn into INT8.

    activation: FakeQuantize with 256 levels between (0 - zero_point) * scale and (255 - zero_point) * scale
    weight:     integer constant -> Convert -> Multiply(scale)

Narrower activations are clamped to their range before a FakeQuantize of 256 levels: the same codes, and the
transformations know no other number of levels.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from torch import Tensor

from edadm_cli.engines.openvino.int4 import int4_constant
from edadm_cli.quant.grid import Grid
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.packing import is_packed

_LEVELS = 256


def fake_quantize(x: ov.Output, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> ov.Output:
    """Codes of `x` on a grid of at most eight bits, as real values."""
    step = np.float32(scale.item())
    zero = 0 if zero_point is None else int(zero_point)
    low = _constant((grid.quant_min - zero) * step)
    if grid.num_bits < 8:
        x = ops.clamp(x, float((grid.quant_min - zero) * step), float((grid.quant_max - zero) * step)).output(0)
    high = _constant((grid.quant_min + _LEVELS - 1 - zero) * step)
    return ops.fake_quantize(x, low, high, low, high, _LEVELS).output(0)


def layer(x: ov.Output, module: QuantizedLayer, name: str) -> ov.Output:
    """A quantized layer; its product carries `name`."""
    grid = module.plan.input_grid
    if grid is not None:
        x = fake_quantize(x, module.input_scale, module.input_zero_point, grid)
    operation, weight = module.operation, _weight(module)
    if operation.kind == "linear":
        product = ops.matmul(x, weight, transpose_a=False, transpose_b=True)
    else:
        (top, left), strides, dilations = operation.padding, list(operation.stride), list(operation.dilation)
        pads = [top, left]
        if operation.groups == 1:
            product = ops.convolution(x, weight, strides, pads, pads, dilations)
        else:
            shape = [operation.groups, module.weight_shape[0] // operation.groups, *module.weight_shape[1:]]
            weight = ops.reshape(weight, _ints(shape), special_zero=False).output(0)
            product = ops.group_convolution(x, weight, strides, pads, pads, dilations)
    product.friendly_name = name
    if module.bias is None:
        return product.output(0)
    return ops.add(product, _constant(operation.per_channel(module.bias.detach().float()).cpu().numpy())).output(0)


def _weight(module: QuantizedLayer) -> ov.Output:
    codes, scale = module.weight_int.cpu().numpy(), module.weight_scale.float().cpu().numpy()
    per_channel = scale.reshape(-1, *[1] * (len(module.weight_shape) - 1))
    constant = int4_constant(codes) if is_packed(module.plan.weight_bits) else ov.op.Constant(codes, shared_memory=True)
    return ops.multiply(ops.convert(constant, "f32"), _constant(per_channel)).output(0)


def _constant(values: np.ndarray | np.float32) -> ov.Node:
    return ops.constant(np.asarray(values, np.float32))


def _ints(values: list[int]) -> ov.Node:
    return ops.constant(np.asarray(values, np.int64))
