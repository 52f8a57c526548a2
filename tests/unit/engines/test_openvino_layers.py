"""One quantized layer in OpenVINO against exact integers."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from torch import Tensor, nn

from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.graph.description import PlannedLayer
from edadm_cli.engines.openvino import OpenVinoEngine, nodes
from edadm_cli.engines.openvino.denoiser import plugin_properties
from edadm_cli.engines.openvino.execution import executed_layers, operation_times, runtime_nodes
from edadm_cli.engines.openvino.int4 import int4_codes, int4_constant, widen
from edadm_cli.engines.parity import relative_l2
from edadm_cli.quant.grid import Grid, activation_grid, quantize, weight_grid
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan
from tests.unit.engines.graph_layers import LAYERS, filled

CPU = EngineOptions(torch.device("cpu"), num_threads=1)


PLANS = {
    "w8a8": LayerPlan(weight_bits=8, activation_bits=8),
    "w4a8": LayerPlan(weight_bits=4, activation_bits=8),
    "w6a6": LayerPlan(weight_bits=6, activation_bits=6),
    "w3a4": LayerPlan(weight_bits=3, activation_bits=4),
}


def _between_ties(layer: QuantizedLayer, shape: tuple[int, ...]) -> Tensor:
    """Inputs over the whole grid and beyond both of its ends, none near the middle between two codes."""
    grid = layer.plan.input_grid
    assert grid is not None
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.quant_min - 3, grid.quant_max + 4, shape, generator=generator)
    offset = torch.rand(shape, generator=generator) * 0.8 - 0.4
    return (codes - layer.input_zero_point + offset) * layer.input_scale


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", LAYERS)
def test_codes_and_sums_are_the_exact_ones(name: str, plan: LayerPlan) -> None:
    assert plan.input_grid is not None
    for zero_point in (0, plan.input_grid.quant_max // 3, plan.input_grid.quant_max):
        layer = filled(name, plan, zero_point, 0.037)
        x = _between_ties(layer, LAYERS[name][1])
        actual = OpenVinoEngine().compile_layer(layer, x, CPU)(x)
        layer.arithmetic = "integer"
        # what remains is float32 scaling: some roundings of 2^-24, amplified where the zero-point's share cancels
        assert relative_l2(actual, layer(x)) < 2e-6


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_float_input_meets_the_dequantized_weights(name: str) -> None:
    plan = LayerPlan(weight_bits=4)
    layer, x = filled(name, plan, 0, 0.037), torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(2))
    assert OpenVinoEngine().layer_refusal(layer) == "its input stays in floating point"
    assert relative_l2(OpenVinoEngine().compile_layer(layer, x, CPU)(x), layer(x)) < 1e-5


def test_a_float_input_is_not_rounded_by_openvino_and_listed_in_floating_point() -> None:
    """OpenVINO rounds inputs of at least 32 channels to eight bits by itself unless it is asked not to."""
    torch.manual_seed(0)
    layer = quantized_layer(nn.Linear(64, 48), LayerPlan(weight_bits=8))
    assert isinstance(layer, QuantizedLayer)
    layer.set_parameters(torch.randint(-128, 128, layer.weight_shape), torch.full((48,), 0.01))
    x = torch.randn(8, 64)
    assert relative_l2(OpenVinoEngine().compile_layer(layer, x, CPU)(x), layer(x)) < 1e-5
    parameter = ops.parameter([8, 64], ov.Type.f32)
    graph = ov.Model([nodes.layer(parameter.output(0), layer, "projection")], [parameter])
    compiled = ov.Core().compile_model(graph, "CPU", plugin_properties(CPU) | {"PERF_COUNT": True})
    compiled([x.numpy()])
    planned = [PlannedLayer(name="projection", kind="linear", planned="float")]
    executed = runtime_nodes(compiled)
    assert [row.precision for row in executed_layers(executed, planned, {}, "float32")] == ["float32"]
    times = [row for row in operation_times(executed, planned, {}, "float32") if row.name == "projection"]
    assert [row.precision for row in times] == ["float32"]


@pytest.mark.parametrize("grid", [activation_grid(8), weight_grid(8), weight_grid(6)], ids=str)
def test_a_code_differs_by_one_and_only_next_to_a_tie(grid: Grid) -> None:
    """OpenVINO rounds x / scale + zero_point, the reference rounds x / scale and then adds."""
    x = torch.randn(1, 1 << 18, generator=torch.Generator().manual_seed(3)) * 3
    scale, zero = torch.tensor(0.0371), torch.tensor(0 if grid.signed else 101)
    parameter = ops.parameter(list(x.shape), ov.Type.f32)
    graph = ov.Model([nodes.fake_quantize(parameter.output(0), scale, zero, grid)], [parameter])
    actual = torch.from_numpy(ov.Core().compile_model(graph, "CPU", plugin_properties(CPU))([x.numpy()])[0].copy())
    codes = torch.round(actual / scale) + zero
    differs = codes != quantize(x, scale, zero, grid)
    quotient = (x / scale).abs()
    assert (codes - quantize(x, scale, zero, grid)).abs().max() <= 1
    assert differs.float().mean() < 1e-4
    # quotient and sum stay below 512, where neighbouring float32 numbers are 2^-15 apart
    from_tie = ((quotient - quotient.floor()) - 0.5).abs()
    assert bool((from_tie[differs] < 2**-13).all())


@settings(max_examples=30)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33), st.booleans())
def test_four_bit_codes_survive_their_packing(values: list[int], as_column: bool) -> None:
    codes = np.array(values, np.int8).reshape((-1, 1) if as_column else (1, -1))
    constant = int4_constant(codes)
    assert constant.get_output_element_type(0) == ov.Type.i4
    np.testing.assert_array_equal(int4_codes(constant), codes)


def test_widening_leaves_no_four_bit_constant() -> None:
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    graph = ov.Model([ops.convert(int4_constant(codes), "f32")], [])
    widen(graph)
    types = {str(node.get_output_element_type(0)) for node in graph.get_ops() if node.get_type_name() == "Constant"}
    assert types == {"<Type: 'int8_t'>"}
