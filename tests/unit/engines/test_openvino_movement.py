"""Quantizers before data movement: the same numbers, and what must stay stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops

from edadm_cli.engines.openvino import nodes
from edadm_cli.engines.openvino.movement import quantize_after_moving, quantize_before_moving
from edadm_cli.quant.grid import Grid, activation_grid, weight_grid

Move = Callable[[ov.Output], ov.Node]
SCALE, ZERO = torch.tensor(0.0371), torch.tensor(7, dtype=torch.int32)


def _sizes(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


def _heads(x: ov.Output) -> ov.Node:
    return ops.transpose(ops.reshape(x, _sizes(0, 0, 4, 3), special_zero=True), _sizes(0, 2, 1, 3))


def _nearest(x: ov.Output) -> ov.Node:
    image = ops.reshape(x, _sizes(0, 0, 4, 3), special_zero=True)
    factors = np.array([2.0, 2.0], np.float32)
    return ops.interpolate(image, factors, "nearest", "scales", axes=_sizes(2, 3))


def _averaged(x: ov.Output) -> ov.Node:
    image = ops.reshape(x, _sizes(0, 0, 4, 3), special_zero=True)
    factors = np.array([2.0, 2.0], np.float32)
    return ops.interpolate(image, factors, "linear_onnx", "scales", axes=_sizes(2, 3))


def _graph(move: Move, grid: Grid, *, is_read_twice: bool = False) -> ov.Model:
    """exp -> move -> quantize, for inputs `[?, ?, 12]`."""
    parameter = ops.parameter([-1, -1, 12], ov.Type.f32)
    moved = move(ops.exp(parameter).output(0))
    zero = None if grid.signed else ZERO
    outputs = [nodes.fake_quantize(moved.output(0), SCALE, zero, grid).get_node()]
    if is_read_twice:
        outputs.append(ops.negative(moved))
    return ov.Model(outputs, [parameter])


def _types_above_quantizers(graph: ov.Model) -> set[str]:
    quantizers = [node for node in graph.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert quantizers
    sources = [node.input_value(0).get_node() for node in quantizers]
    return {(s.input_value(0).get_node() if s.get_type_name() == "Clamp" else s).get_type_name() for s in sources}


def _codes(graph: ov.Model, rows: int, tokens: int) -> list[np.ndarray]:
    x = np.random.default_rng(rows).standard_normal((rows, tokens, 12)).astype(np.float32)
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    # real values of a code may differ by a rounding where the scale is multiplied in elsewhere
    return [np.rint(output / np.float32(SCALE)) for output in compiled([x]).values()]


@pytest.mark.parametrize("grid", [activation_grid(8), weight_grid(8), activation_grid(4)], ids=str)
@pytest.mark.parametrize("move", [_heads, _nearest])
def test_the_quantizer_comes_first_and_nothing_changes(move: Move, grid: Grid) -> None:
    before, after = _graph(move, grid), _graph(move, grid)
    quantize_before_moving(after)
    assert _types_above_quantizers(before) in ({"Transpose"}, {"Interpolate"})
    assert _types_above_quantizers(after) == {"Exp"}
    for rows, tokens in ((1, 5), (3, 8)):
        for actual, expected in zip(_codes(after, rows, tokens), _codes(before, rows, tokens), strict=True):
            assert len(np.unique(expected)) > 3
            np.testing.assert_array_equal(actual, expected)


def test_what_makes_new_values_is_not_passed() -> None:
    graph = _graph(_averaged, activation_grid(8))
    quantize_before_moving(graph)
    assert _types_above_quantizers(graph) == {"Interpolate"}


def test_moved_data_with_another_reader_stays() -> None:
    before, after = (_graph(_heads, activation_grid(8), is_read_twice=True) for _ in range(2))
    quantize_before_moving(after)
    assert _types_above_quantizers(after) == {"Transpose"}
    for actual, expected in zip(_codes(after, 2, 5), _codes(before, 2, 5), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_scale_for_each_channel_stays() -> None:
    parameter = ops.parameter([1, 2, 12], ov.Type.f32)
    moved = ops.transpose(ops.exp(parameter), _sizes(0, 2, 1))
    high = np.arange(1, 13, dtype=np.float32).reshape(1, 12, 1)
    graph = ov.Model([ops.fake_quantize(moved, 0 * high, high, 0 * high, high, 256)], [parameter])
    quantize_before_moving(graph)
    assert _types_above_quantizers(graph) == {"Transpose"}


@pytest.mark.parametrize("grid", [weight_grid(8), weight_grid(4)], ids=str)
def test_a_quantizer_moves_back_after_the_movement(grid: Grid) -> None:
    before, after = _graph(_heads, grid), _graph(_heads, grid)
    quantize_before_moving(after)
    (quantizer,) = (node for node in after.get_ops() if node.get_type_name() == "FakeQuantize")
    quantize_after_moving(quantizer)
    assert "Transpose" in {node.get_type_name() for node in _above(quantizer)}
    for actual, expected in zip(_codes(after, 2, 5), _codes(before, 2, 5), strict=True):
        np.testing.assert_array_equal(actual, expected)


def _above(node: ov.Node) -> list[ov.Node]:
    sources = [value.get_node() for value in node.input_values()]
    return sources + [each for source in sources for each in _above(source)]
