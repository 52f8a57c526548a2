"""Finds the products of a graph that run in bytes, and converts them to floating point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from edadm_cli.engines.base import LayerKind
from edadm_cli.engines.openvino.execution import layer_name

_KINDS: dict[str, LayerKind] = {"Convolution": "conv2d", "GroupConvolution": "conv2d", "MatMul": "linear"}
_MOVES = (
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Split",
    "VariadicSplit",
    "Slice",
    "StridedSlice",
    "Broadcast",
    "Interpolate",
)


@dataclass(frozen=True)
class QuantizedProduct:
    """A product of two quantized operands.

    Attributes:
        node: The convolution or matrix product.
        kind: The kind of the layer; `attention` if both operands are activations.
        weight: The multiplication of int8 codes by their scales; `None` in attention.
    """

    node: ov.Node
    kind: LayerKind
    weight: ov.Node | None

    @property
    def layer(self) -> str:
        """Returns the name of the layer that the product belongs to."""
        return layer_name(self.node.friendly_name)

    def compute_in_float(self) -> None:
        """Replaces its codes with floating-point numbers of the same values, so that no integer pattern is left."""
        if self.weight is not None:
            _use_real_weights(self.weight)
        else:
            for port in (0, 1):
                _round_in_float(source(self.node.input_value(port)))

    def use_fastest_float(self) -> None:
        """Replaces the product's codes with floating-point numbers. Attention's operands are then not on their grids.

        Rounding the probabilities in floating point takes longer than the product, and keeps OpenVINO from computing
        attention in one kernel. Operands that are not rounded are nearer to those of full precision.
        """
        if self.weight is not None:
            _use_real_weights(self.weight)
        else:
            for port in (0, 1):
                quantizer = source(self.node.input_value(port))
                if is_quantizer(quantizer):  # one that both operands share, or another product, is removed once
                    quantizer.output(0).replace(quantizer.input_value(0))


def quantized_products(graph: ov.Model) -> Iterator[QuantizedProduct]:
    """Yields the products of a graph whose operands are both quantized, in the order of execution."""
    for node in graph.get_ordered_ops():
        kind = _KINDS.get(node.get_type_name())
        if kind is None or not is_quantizer(source(node.input_value(0))):
            continue  # in floating point on any processor
        weight = _scaled_codes(node.input_value(1))
        if weight is not None:
            yield QuantizedProduct(node, kind, weight)
        elif is_quantizer(source(node.input_value(1))):
            yield QuantizedProduct(node, "attention", None)


def coded_products(graph: ov.Model) -> Iterator[QuantizedProduct]:
    """Yields the products of a graph whose weight consists of int8 codes, whether or not their input is quantized."""
    for node in graph.get_ordered_ops():
        kind = _KINDS.get(node.get_type_name())
        weight = None if kind is None else _scaled_codes(node.input_value(1))
        if kind is not None and weight is not None:
            yield QuantizedProduct(node, kind, weight)


def source(output: ov.Output) -> ov.Node:
    """Returns the node that computes an output's values, before any data movement."""
    node = output.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node


def is_quantizer(node: ov.Node) -> bool:
    """Returns whether a node quantizes numbers to codes."""
    return bool(node.get_type_name() == "FakeQuantize")


def quantizer_of_layer(quantizer: ov.Node) -> ov.Node:
    """Returns the quantizer of the input of the linear layer whose output a quantizer rounds; itself without one."""
    node = source(quantizer.input_value(0))
    while node.get_type_name() in ("Add", "Clamp"):  # a bias, a grid of fewer than eight bits
        node = source(node.input_value(0))
    is_layer = node.get_type_name() == "MatMul" and _scaled_codes(node.input_value(1)) is not None
    first = source(node.input_value(0)) if is_layer else quantizer
    return first if is_quantizer(first) else quantizer


def _scaled_codes(output: ov.Output) -> ov.Node | None:
    """Returns the multiplication of int8 codes by their scales that an output comes from; `None` for other outputs."""
    node = source(output)
    if node.get_type_name() != "Multiply" or node.input_value(0).get_node().get_type_name() != "Convert":
        return None
    constant = node.input_value(0).get_node().input_value(0).get_node()
    is_codes = constant.get_type_name() == "Constant" and constant.get_output_element_type(0) == ov.Type.i8
    return node if is_codes else None


def codes_of(scaled: ov.Node) -> np.ndarray:
    """Returns the int8 codes of a constant that is scaled."""
    codes: np.ndarray = scaled.input_value(0).get_node().input_value(0).get_node().data
    return codes


def _use_real_weights(scaled: ov.Node) -> None:
    """Replaces codes and scales with a float32 constant, so that no integer pattern is left."""
    values = codes_of(scaled).astype(np.float32) * scaled.input_value(1).get_node().data
    scaled.output(0).replace(ov.op.Constant(values).output(0))


def _round_in_float(quantizer: ov.Node) -> None:
    """Replaces a FakeQuantize of 256 levels with plain arithmetic."""
    low, high = (np.float32(quantizer.input_value(port).get_node().data.item()) for port in (1, 2))
    step = np.float32((high - low) / np.float32(255))
    first = float(np.round(low / step))
    scaled = ops.multiply(quantizer.input_value(0), ops.constant(np.float32(1 / step)))
    # the product before it may be fused to it, and take its name
    scaled.friendly_name = f"{quantizer.input_value(0).get_node().friendly_name}/scaled"
    codes = ops.round(scaled, "half_to_even")
    values = ops.multiply(ops.clamp(codes, first, first + 255), ops.constant(np.float32(step)))
    quantizer.output(0).replace(values.output(0))
