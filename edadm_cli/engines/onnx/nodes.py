r"""Writes quantized layers as ONNX nodes, in the form that every runtime reads.

    activation:  [Clip ->] QuantizeLinear -> DequantizeLinear, one scale and zero-point per tensor, uint8
    weight:      DequantizeLinear of int8, or of int4 if codes have at most four bits, one scale per row (axis 0)

A grid of fewer than eight bits is a Clip to the values of its first and last code, before a QuantizeLinear of eight
bits. The bounds are whole multiples of the scale, which round to exactly those codes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from edadm_cli.quant.grid import Grid
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.storage import is_packed

_BYTE_BITS = 8


class Writer:
    """Collects nodes and initializers, which have the names of the layers.

    Args:
        symmetric: Whether activations are written as int8 with zero-point 0, as TensorRT reads them, and not as uint8.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.symmetric = symmetric

    def layer(self, x: ir.Value, module: QuantizedLayer, name: str) -> ir.Value:
        """Adds the nodes of a quantized layer, whose product has the name `name`, and returns the layer's output."""
        quantizer = module.input_quantizer
        if quantizer is not None:
            factors = quantizer.channel_factors()
            if factors is not None:
                shape = (-1,) if quantizer.channel_dim == -1 else (1, -1, 1, 1)
                values = self._constant(f"{name}.input.factors", _array(factors.float()).reshape(shape))
                x = self._add("Mul", [x, values], f"{name}.input.transform")
            zero_point = int(quantizer.zero_point)
            x = self.fake_quantize(x, quantizer.scale, zero_point, quantizer.grid, f"{name}.input")
        weight, operation = self._weight(module, name), module.operation
        bias = None if module.bias is None else self._constant(f"{name}.bias", _array(module.bias.float()))
        if operation.kind == "conv2d":
            (top, left), inputs = operation.padding, [x, weight] if bias is None else [x, weight, bias]
            attributes = {
                "kernel_shape": list(module.weight_shape[2:]),
                "strides": list(operation.stride),
                "pads": [top, left, top, left],
                "dilations": list(operation.dilation),
                "group": operation.groups,
            }
            return self._add("Conv", inputs, name, attributes)
        transposed = self._add("Transpose", [weight], f"{name}.weight_transposed", {"perm": [1, 0]})
        product = self._add("MatMul", [x, transposed], name)
        return product if bias is None else self._add("Add", [product, bias], f"{name}.add_bias")

    def fake_quantize(self, x: ir.Value, scale: Tensor, zero_point: int, grid: Grid, name: str) -> ir.Value:
        """Adds a quantizer with at most eight bits, and returns the dequantized codes of `x`."""
        step = _array(scale.float()).reshape(())
        if grid.num_bits < _BYTE_BITS:
            low, high = (np.float32(code - zero_point) * step for code in (grid.quant_min, grid.quant_max))
            bounds = [self._constant(f"{name}.low", np.asarray(low)), self._constant(f"{name}.high", np.asarray(high))]
            x = self._add("Clip", [x, *bounds], f"{name}.clip")
        parameters = [
            self._constant(f"{name}.scale", step),
            self._constant(f"{name}.zero_point", self._zero(zero_point, grid)),
        ]
        codes = self._add("QuantizeLinear", [x, *parameters], f"{name}.quantize")
        return self._add("DequantizeLinear", [codes, *parameters], f"{name}.dequantize")

    def _zero(self, zero_point: int, grid: Grid) -> np.ndarray:
        """Returns the code of zero, shifted up for a signed grid in uint8, or down for an unsigned grid in int8."""
        half = 1 << (grid.num_bits - 1)
        if self.symmetric:
            return np.asarray(zero_point - (0 if grid.signed else half), np.int8)
        return np.asarray(zero_point + (half if grid.signed else 0), np.uint8)

    def _weight(self, module: QuantizedLayer, name: str) -> ir.Value:
        codes = _array(module.weight_int)
        if is_packed(module.plan.product_bits):
            codes = codes.astype(ml_dtypes.int4)
        scale = _array(module.weight_scale.float())
        values = [self._constant(f"{name}.weight", codes), self._constant(f"{name}.weight_scale", scale)]
        return self._add("DequantizeLinear", values, f"{name}.weight_dequantize", {"axis": 0})

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        self.initializers.append(value)
        return value

    def _add(
        self, operator: str, inputs: list[ir.Value], name: str, attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        node = ir.node(operator, inputs=inputs, attributes=attributes, name=name)
        node.outputs[0].name = f"{name}:0"
        self.nodes.append(node)
        return node.outputs[0]


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
