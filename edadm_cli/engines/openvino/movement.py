"""Moves quantizers from after data movement to before it.

    quantize(move(x)) = move(quantize(x))

This holds for any operation that only moves elements, since all elements share one scale. A quantizer before the
movement is fused with the operation that computes the elements, and bytes are moved in place of floating-point numbers.
On some processors attention is faster with quantizers after the movement. `forms` measures that, and moves them back.
"""

from __future__ import annotations

import openvino as ov

_STEPS = ("Clamp", "FakeQuantize")
_MOVES = ("Reshape", "Transpose")


def quantize_before_moving(graph: ov.Model) -> None:
    """Moves every quantizer of a graph up through data movement, in place, as far as no other reader is affected."""
    for node in graph.get_ordered_ops():
        is_step = node.get_type_name() in _STEPS and all(map(_is_scalar, node.input_values()[1:]))
        if is_step:
            while _moves_for_one(node.input_value(0)):
                _swap(node, node.input_value(0).get_node())
    graph.validate_nodes_and_infer_types()


def quantize_after_moving(quantizer: ov.Node) -> None:
    """Moves a quantizer of one scale down through the data movement after it, in place."""
    readers = [target.get_node() for target in quantizer.output(0).get_target_inputs()]
    while len(readers) == 1 and readers[0].get_type_name() in _MOVES:
        _swap(readers[0], quantizer)
        readers[0].validate_and_infer_types()
        quantizer.validate_and_infer_types()
        readers = [target.get_node() for target in quantizer.output(0).get_target_inputs()]


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


def _swap(second: ov.Node, first: ov.Node) -> None:
    """Replaces first -> second with second -> first."""
    readers = second.output(0).get_target_inputs()
    second.input(0).replace_source_output(first.input_value(0))
    first.input(0).replace_source_output(second.output(0))
    for reader in readers:
        reader.replace_source_output(first.output(0))
