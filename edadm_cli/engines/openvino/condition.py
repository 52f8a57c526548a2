"""Moves what depends only on the condition to a separate graph, which runs once per prompt.

While an image is generated, the sample and the timestep change from call to call, and the condition does not. The
projections of a prompt, such as its keys and values, are therefore computed in the first call with it, and kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from edadm_cli.engines.openvino.products import is_quantizer, source

_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
_FIRST_CODE, _LEVELS = -128, 256


def take_out(graph: ov.Model, steady: Collection[str]) -> ov.Model | None:
    """Replaces what products compute from a graph's condition alone with new inputs, in place.

    Numbers that a quantizer of signed bytes made become inputs of codes.

    Args:
        graph: A graph with static shapes. Its inputs keep their places, and the new inputs follow them.
        steady: The names of the inputs that belong to the condition.

    Returns:
        A graph that computes the new inputs, in their order, from the original inputs; `None` if there are none.
    """
    twin = graph.clone()  # shares the constants
    outputs = list(_last_outputs(graph, steady))
    if not outputs:
        return None
    results = [ops.result(_codes_of(output)) for output in _last_outputs(twin, steady)]
    head = ov.Model(results, twin.get_parameters(), "condition")
    graph.add_parameters([_replace(output) for output in outputs])
    graph.validate_nodes_and_infer_types()
    return head


def _last_outputs(graph: ov.Model, steady: Collection[str]) -> Iterator[ov.Output]:
    """Yields the outputs that depend on the condition alone, follow a product and have a reader that depends on more.

    They come in the order of execution, which a clone shares.
    """
    alone, after_product, varying = set[str](), set[str](), set[str]()
    for node in graph.get_ordered_ops():
        name, kind = node.get_name(), node.get_type_name()
        sources = {value.get_node().get_name() for value in node.input_values()}
        if kind == "ShapeOf":
            continue  # a shape is constant
        if kind == "Parameter":
            (alone if node.get_friendly_name() in steady else varying).add(name)
        elif not varying.isdisjoint(sources):
            varying.add(name)
        elif not alone.isdisjoint(sources):
            alone.add(name)
            if kind in _PRODUCTS or not after_product.isdisjoint(sources):
                after_product.add(name)
    for node in graph.get_ordered_ops():
        if node.get_name() not in after_product:
            continue
        for output in node.outputs():
            if any(target.get_node().get_name() in varying for target in output.get_target_inputs()):
                yield output


def _step_of(output: ov.Output) -> float | None:
    """Returns the step of the grid of signed bytes on which an output's numbers are; `None` for others."""
    quantizer = source(output)
    if not is_quantizer(quantizer) or quantizer.get_attributes()["levels"] != _LEVELS:
        return None
    low, high = (quantizer.input_value(port).get_node().data for port in (3, 4))
    if low.size != 1 or high.size != 1:
        return None
    step = (float(high.item()) - float(low.item())) / (_LEVELS - 1)
    return step if step > 0 and round(float(low.item()) / step, 3) == _FIRST_CODE else None


def _codes_of(output: ov.Output) -> ov.Output:
    """Returns the int8 codes of an output whose numbers are on a grid of signed bytes, and other outputs unchanged."""
    step = _step_of(output)
    if step is None:
        return output
    codes = (_FIRST_CODE, _FIRST_CODE + _LEVELS - 1)
    bounds = [ops.constant(np.float32(bound)) for bound in (*(code * step for code in codes), *codes)]
    return ops.convert(ops.fake_quantize(output, *bounds, _LEVELS), "i8").output(0)


def _replace(output: ov.Output) -> ov.op.Parameter:
    """Replaces an output with a new input, which is returned: of codes where there are any."""
    step, readers = _step_of(output), list(output.get_target_inputs())
    kind = output.get_element_type() if step is None else ov.Type.i8
    parameter = ops.parameter(output.get_shape(), kind)
    parameter.set_friendly_name(f"{output.get_node().get_friendly_name()}/value")
    value = parameter.output(0)
    if step is not None:
        value = ops.multiply(ops.convert(parameter, "f32"), ops.constant(np.float32(step))).output(0)
    for reader in readers:
        reader.replace_source_output(value)
    return parameter
