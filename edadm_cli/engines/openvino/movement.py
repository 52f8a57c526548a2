"""Moves quantizers from after data movement to before it.

    quantize(move(x)) = move(quantize(x))

This holds for any operation that only moves elements, since all elements share one scale. A quantizer before the
movement is fused with the operation that computes the elements, and bytes are moved in place of floating-point numbers.
Attention's operands are not changed, because OpenVINO fuses attention only if the quantizers come directly before the
products.
"""

from __future__ import annotations

import openvino as ov

from edadm_cli.engines.openvino.products import is_quantizer, source

_STEPS = ("Clamp", "FakeQuantize")
_MOVES = ("Reshape", "Transpose")


def quantize_before_moving(graph: ov.Model) -> None:
    """Moves every quantizer of a graph up through data movement, in place, as far as no other reader is affected."""
    for node in graph.get_ordered_ops():
        is_step = node.get_type_name() in _STEPS and all(map(_is_scalar, node.input_values()[1:]))
        if is_step and not _feeds_attention(node):
            while _moves_for_one(node.input_value(0)):
                _swap(node, node.input_value(0).get_node())
    graph.validate_nodes_and_infer_types()


def _feeds_attention(node: ov.Node) -> bool:
    """Returns whether the output of a quantizer is multiplied by the output of another quantizer."""
    for reader in (target.get_node() for target in node.output(0).get_target_inputs()):
        kind = reader.get_type_name()
        if kind == "MatMul" and all(is_quantizer(source(value)) for value in reader.input_values()):
            return True
        if kind in (*_STEPS, *_MOVES) and _feeds_attention(reader):
            return True
    return False


def _is_scalar(output: ov.Output) -> bool:
    shape = output.get_partial_shape()
    return shape.is_static and all(size == 1 for size in shape.to_shape())


def _moves_for_one(output: ov.Output) -> bool:
    """Returns whether an output comes from data movement and has one reader."""
    node = output.get_node()
    moves = node.get_type_name() in _MOVES or (
        node.get_type_name() == "Interpolate" and node.get_attributes()["mode"] == "nearest"
    )
    return moves and len(output.get_target_inputs()) == 1


def _swap(step: ov.Node, move: ov.Node) -> None:
    """Replaces move -> step with step -> move."""
    readers = step.output(0).get_target_inputs()
    step.input(0).replace_source_output(move.input_value(0))
    move.input(0).replace_source_output(step.output(0))
    for reader in readers:
        reader.replace_source_output(move.output(0))
