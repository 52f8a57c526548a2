"""Moves sines and cosines of timesteps and positions to a separate graph, which computes them in float32.

With `INFERENCE_PRECISION_HINT` bfloat16 or float16, OpenVINO rounds their arguments too. A timestep of 987 in bfloat16
is off by up to 2 radians, so that the embedding of a timestep has hardly anything to do with it (OpenVINO 2026.4). The
attribute with which a node of OpenVINO can ask for its own precision has no effect on the CPU.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

_SINUSOIDS = ("Sin", "Cos")
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
"""The products of layers. A sine of a layer's output is not an embedding, and stays in the graph."""


def take_out(graph: ov.Model) -> ov.Model | None:
    """Replaces the sines and cosines of a graph's inputs with new inputs, in place.

    Args:
        graph: A graph with static shapes. Its inputs keep their places, and one input per sine and cosine follows them.

    Returns:
        A graph that computes the new inputs, in their order, from the original inputs; `None` if there are none.
    """
    twin = graph.clone()  # shares the constants
    embeddings = _embeddings(graph)
    if not embeddings:
        return None
    head = ov.Model([ops.result(node.output(0)) for node in _embeddings(twin)], twin.get_parameters(), "sinusoids")
    parameters = [_replace(node.output(0)) for node in embeddings]
    graph.add_parameters(parameters)
    graph.validate_nodes_and_infer_types()
    return head


def _embeddings(graph: ov.Model) -> list[ov.Node]:
    """Returns the sines and cosines of a graph's inputs, in the order of execution, which a clone shares."""
    return [node for node in graph.get_ordered_ops() if _is_embedding(node)]


def _is_embedding(node: ov.Node) -> bool:
    """Returns whether a node is a sine or cosine of a graph's inputs that no layer has touched."""
    if node.get_type_name() not in _SINUSOIDS:
        return False
    depends, waiting, seen = False, [node], set[str]()
    while waiting:
        current = waiting.pop()
        if current.get_friendly_name() in seen:
            continue
        seen.add(current.get_friendly_name())
        kind = current.get_type_name()
        if kind in _PRODUCTS:
            return False
        depends = depends or kind == "Parameter"
        waiting.extend(value.get_node() for value in current.input_values())
    return depends


def _replace(output: ov.Output) -> ov.op.Parameter:
    parameter = ops.parameter(output.get_shape(), output.get_element_type())
    parameter.set_friendly_name(f"{output.get_node().get_friendly_name()}/value")
    for reader in list(output.get_target_inputs()):
        reader.replace_source_output(parameter.output(0))
    return parameter
