"""Writes quantized operations as OpenVINO nodes, in patterns that its low-precision transformations turn into INT8.

    activation: FakeQuantize with 256 levels between (0 - zero_point) * scale and (255 - zero_point) * scale
    weight:     integer constant -> Convert -> Multiply(scale)

Activations with fewer bits are clamped to their range before a FakeQuantize of 256 levels, which gives the same codes.
The transformations support no other number of levels.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from torch import Tensor

from edadm_cli.engines.openvino.int4 import int4_constant
from edadm_cli.quant.grid import Grid
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.storage import is_packed

_LEVELS = 256


def fake_quantize(x: ov.Output, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> ov.Output:
    """Returns the dequantized codes of `x` on a grid of at most eight bits."""
    step = np.float32(scale.item())
    zero = 0 if zero_point is None else int(zero_point)
    if grid.num_bits < 8:
        x = ops.clamp(x, float((grid.quant_min - zero) * step), float((grid.quant_max - zero) * step)).output(0)
    # for signed codes 0 is in the middle of the 256 levels, as they would need a zero-point otherwise
    first = -_LEVELS // 2 if grid.signed else 0
    low, high = _constant((first - zero) * step), _constant((first + _LEVELS - 1 - zero) * step)
    return ops.fake_quantize(x, low, high, low, high, _LEVELS).output(0)


def layer(x: ov.Output, module: QuantizedLayer, name: str) -> ov.Output:
    """Returns the output of a quantized layer, whose product carries `name`."""
    product = _linear if module.operation.kind == "linear" else _convolution
    return product(_input(x, module), module, _tensors(module), name)


def geglu(x: ov.Output, module: QuantizedLayer, name: str) -> ov.Output:
    """Returns value * gelu(gate) of a linear layer whose output holds both halves.

    It has two products in place of one product that is split, because splitting would copy every element, and OpenVINO
    fuses the element-wise operations of each half with its product.
    """
    x, (codes, scale, bias) = _input(x, module), _tensors(module)
    half = module.out_features // 2

    def product(rows: slice, part: str) -> ov.Output:
        tensors = codes[rows], scale[rows], None if bias is None else bias[rows]
        return _linear(x, module, tensors, f"{name}/{part}")

    value, gate = product(slice(None, half), "value"), product(slice(half, None), "gate")
    return ops.multiply(value, ops.gelu(gate, "erf")).output(0)


Tensors = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _input(x: ov.Output, module: QuantizedLayer) -> ov.Output:
    quantizer = module.input_quantizer
    if quantizer is None:
        return x
    factors = quantizer.channel_factors()
    if factors is not None:
        shape = (-1,) if quantizer.channel_dim == -1 else (1, -1, 1, 1)
        x = ops.multiply(x, _constant(factors.detach().float().cpu().numpy().reshape(shape))).output(0)
    return fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.grid)


def _tensors(module: QuantizedLayer) -> Tensors:
    """Returns codes with shape `weight_shape`, scales `[C_out]` and bias `[C_out]`."""
    bias = None if module.bias is None else module.bias.detach().float().cpu().numpy()
    return module.weight_int.cpu().numpy(), module.weight_scale.float().cpu().numpy(), bias


def _linear(x: ov.Output, module: QuantizedLayer, tensors: Tensors, name: str) -> ov.Output:
    codes, scale, bias = tensors
    product = ops.matmul(x, _weight(module, codes, scale), transpose_a=False, transpose_b=True)
    product.friendly_name = name
    return product.output(0) if bias is None else _biased(product, bias, name)


def _convolution(x: ov.Output, module: QuantizedLayer, tensors: Tensors, name: str) -> ov.Output:
    codes, scale, bias = tensors
    operation, weight = module.operation, _weight(module, codes, scale)
    strides, pads, dilations = list(operation.stride), list(operation.padding), list(operation.dilation)
    if operation.groups == 1:
        product = ops.convolution(x, weight, strides, pads, pads, dilations)
    else:
        shape = [operation.groups, module.weight_shape[0] // operation.groups, *module.weight_shape[1:]]
        weight = ops.reshape(weight, ops.constant(np.asarray(shape, np.int64)), special_zero=False).output(0)
        product = ops.group_convolution(x, weight, strides, pads, pads, dilations)
    product.friendly_name = name
    return product.output(0) if bias is None else _biased(product, bias.reshape(1, -1, 1, 1), name)


def _biased(product: ov.Node, bias: np.ndarray, name: str) -> ov.Output:
    total = ops.add(product, _constant(bias))
    total.friendly_name = f"{name}/bias"  # in floating point a product takes the name of what is fused to it last
    return total.output(0)


def _weight(module: QuantizedLayer, codes: np.ndarray, scale: np.ndarray) -> ov.Output:
    per_channel = scale.reshape(-1, *[1] * (codes.ndim - 1))
    constant = (
        int4_constant(codes) if is_packed(module.plan.product_bits) else ov.op.Constant(codes, shared_memory=True)
    )
    return ops.multiply(ops.convert(constant, "f32"), _constant(per_channel)).output(0)


def _constant(values: np.ndarray | np.float32) -> ov.Node:
    return ops.constant(np.asarray(values, np.float32))
