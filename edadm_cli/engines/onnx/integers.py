"""Rewrites an exported graph into the form that ONNX Runtime runs in integers, with the same codes and sums.

ONNX Runtime turns a product of dequantized operands into one of integers only if the output is quantized too, or if it
is a plain matrix product of eight-bit operands. Convolutions, four-bit weights and layers with two-dimensional inputs
would run in floating point. When a file is loaded, the graph is therefore rewritten:

- A convolution or linear layer of codes becomes `ConvInteger` or `MatMulInteger` with int32 sums, which are scaled and
  shifted in float32. Four-bit weights are held as int8.
- The weight of a layer whose input is not quantized is dequantized once.
- If an attention's operand is transposed after its quantizer, it is transposed before it instead, so that ONNX Runtime
  can fuse quantizer and product.
- Codes are computed from `x * (1 / scale)`, as in every engine, and not from `x / scale`, as QuantizeLinear does, which
  rounds to another code about once per million values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_CONVOLUTION = ("kernel_shape", "strides", "pads", "dilations", "group")


def in_integers(model: ir.Model) -> None:
    """Rewrites a graph written by `export_onnx`, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type not in ("Conv", "MatMul"):
            continue
        weight = _weight(node)
        if weight is None:
            for side in range(2 if node.op_type == "MatMul" else 0):
                _quantize_last(graph, node, side)
        elif _dequantize(node.inputs[0]) is None:
            _dequantize_once(graph, weight)
        else:
            _multiply_codes(graph, node, weight)
    one = _constant(graph, "one", np.ones((), np.float32))
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _multiply_by_reciprocal(graph, node, one)
    RemoveUnusedNodesPass()(model)


def _weight(node: ir.Node) -> ir.Node | None:
    """Returns the DequantizeLinear of a constant that a product reads, through a Transpose where there is one."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    dequantize = _dequantize(value)
    return (
        dequantize
        if dequantize is not None and dequantize.inputs[0] is not None and dequantize.inputs[0].is_initializer()
        else None
    )


def _multiply_codes(graph: ir.Graph, node: ir.Node, weight: ir.Node) -> None:
    x = _dequantize(node.inputs[0])
    assert x is not None
    codes, scale, zero_point = x.inputs[:3]
    step = _numpy(scale) * _numpy(weight.inputs[1])  # float32, as in the epilogue of the reference
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight_codes = _numpy(weight.inputs[0]).astype(np.int8)
    operator, per_channel, attributes = "MatMulInteger", [-1], {}
    if node.op_type == "Conv":
        operator, per_channel = "ConvInteger", [1, -1, 1, 1]
        attributes = {name: node.attributes[name] for name in _CONVOLUTION}
    else:
        weight_codes = np.ascontiguousarray(weight_codes.T)
    constant = _constant(graph, f"{node.name}.weight_int8", weight_codes)
    new = [ir.node(operator, [codes, constant, zero_point], attributes, name=node.name)]
    new.append(ir.node("Cast", [new[-1].outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}.cast"))
    factor = _constant(graph, f"{node.name}.step", step.reshape(per_channel))
    new.append(ir.node("Mul", [new[-1].outputs[0], factor], name=f"{node.name}.scale"))
    if bias is not None:
        shift = _constant(graph, f"{node.name}.shift", _numpy(bias).reshape(per_channel))
        new.append(ir.node("Add", [new[-1].outputs[0], shift], name=f"{node.name}.add"))
    _replace(graph, node, new)


def _dequantize_once(graph: ir.Graph, weight: ir.Node) -> None:
    codes, scale = (_numpy(value) for value in weight.inputs[:2])
    real = codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
    constant = _constant(graph, f"{weight.name}.once", real)
    weight.outputs[0].replace_all_uses_with(constant)


def _quantize_last(graph: ir.Graph, product: ir.Node, side: int) -> None:
    """Replaces Quantize -> Dequantize -> Transpose -> MatMul with Transpose -> Quantize -> Dequantize -> MatMul."""
    value = product.inputs[side]
    transpose = value.producer() if value is not None else None
    dequantize = (
        _dequantize(transpose.inputs[0]) if transpose is not None and transpose.op_type == "Transpose" else None
    )
    codes = dequantize.inputs[0] if dequantize is not None else None
    quantize = codes.producer() if codes is not None else None
    if transpose is None or dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return
    turned = ir.node("Transpose", quantize.inputs[:1], transpose.attributes, name=f"{product.name}.transpose")
    again = ir.node("QuantizeLinear", [turned.outputs[0], *quantize.inputs[1:]], name=f"{product.name}.quantize")
    real = ir.node("DequantizeLinear", [again.outputs[0], *dequantize.inputs[1:]], name=f"{product.name}.dequantize")
    for made in (turned, again, real):
        made.outputs[0].name = f"{made.name}:codes"
    graph.insert_before(product, [turned, again, real])
    product.replace_input_with(side, real.outputs[0])


def _multiply_by_reciprocal(graph: ir.Graph, quantize: ir.Node, one: ir.Value) -> None:
    factor = _constant(graph, f"{quantize.name}.factor", np.reciprocal(_numpy(quantize.inputs[1])))
    scaled = ir.node("Mul", [quantize.inputs[0], factor], name=f"{quantize.name}.scaled")
    scaled.outputs[0].name = scaled.name
    graph.insert_before(quantize, scaled)
    quantize.replace_input_with(0, scaled.outputs[0])
    quantize.replace_input_with(1, one)


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    for made in new:
        made.outputs[0].name = f"{made.name}:codes"
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [old.outputs[0]], [new[-1].outputs[0]])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _numpy(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array
