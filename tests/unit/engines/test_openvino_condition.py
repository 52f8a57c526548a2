"""What depends only on the condition is taken out of a graph, in codes where it is quantized."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edadm_cli.engines.openvino import condition

FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}


def number(value: float) -> ov.Node:
    return ops.constant(np.float32(value))


def projected(states: ov.Node, seed: int) -> ov.Node:
    """Returns the product of a prompt of 16 channels and a random weight."""
    weight = np.random.default_rng(seed).standard_normal((16, 16)).astype(np.float32)
    return ops.matmul(states, ops.constant(weight), transpose_a=False, transpose_b=True)


def attention() -> ov.Model:
    """Returns attention of a sample to a prompt, whose keys are signed bytes."""
    sample, states = (ops.parameter([1, tokens, 16], ov.Type.f32, name=name) for tokens, name in ((6, "a"), (4, "b")))
    bounds = [number(step * 0.1) for step in (-128, 127, -128, 127)]
    keys = ops.transpose(ops.fake_quantize(projected(states, 0), *bounds, 256), ops.constant(np.array([0, 2, 1])))
    probabilities = ops.softmax(ops.matmul(sample, keys, transpose_a=False, transpose_b=False), 2)
    values = ops.add(projected(states, 1), number(1))
    return ov.Model([ops.matmul(probabilities, values, transpose_a=False, transpose_b=False)], [sample, states])


def computed(graph: ov.Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    return list(ov.Core().compile_model(graph, "CPU", FLOAT)(inputs).values())


def test_both_graphs_compute_the_whole() -> None:
    graph, generator = attention(), np.random.default_rng(2)
    inputs = [generator.standard_normal((1, tokens, 16)).astype(np.float32) for tokens in (6, 4)]
    (expected,) = computed(graph, inputs)
    head = condition.take_out(graph, ["b"])
    assert head is not None
    values = computed(head, inputs)
    assert [value.dtype for value in values] == [np.int8, np.float32]  # keys, values
    assert [list(value.shape) for value in values] == [[1, 16, 4], [1, 4, 16]]
    assert sum(node.get_type_name() == "MatMul" for node in graph.get_ops()) == 2
    (result,) = computed(graph, [inputs[0], np.zeros_like(inputs[1]), *values])
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steady", [["b"], []])
def test_a_condition_that_no_product_reads_stays(steady: list[str]) -> None:
    sample, states = (ops.parameter([1, 4], ov.Type.f32, name=name) for name in ("a", "b"))
    graph = ov.Model([ops.add(sample, ops.multiply(states, number(2)))], [sample, states])
    assert condition.take_out(graph, steady) is None
    assert len(graph.inputs) == 2
