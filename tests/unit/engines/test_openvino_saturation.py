"""Processors that add products of bytes in 16 bits: found out, and exact all the same."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions, LayerKind
from edadm_cli.engines.openvino import OpenVinoEngine, nodes, saturation
from edadm_cli.engines.openvino.denoiser import plugin_properties
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.models.example_calls import example_call
from edadm_cli.quant.grid import weight_grid
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan
from tests.denoisers.families import EVERYWHERE

CPU = EngineOptions(torch.device("cpu"), num_threads=1)
ALL: frozenset[LayerKind] = frozenset(get_args(LayerKind))
LAYERS = {
    "conv": (nn.Conv2d(20, 24, 3, padding=1), (1, 20, 9, 8)),
    "pointwise": (nn.Conv2d(64, 32, 1), (2, 64, 5, 5)),
    "groups": (nn.Conv2d(8, 12, 3, groups=2), (1, 8, 7, 7)),
    "linear": (nn.Linear(48, 40), (3, 7, 48)),
}


@pytest.fixture
def saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that adds all products of bytes in 16 bits, whichever this one is."""
    monkeypatch.setattr(saturation, "saturating_kinds", lambda: ALL)


def _at_the_ends(name: str, bits: int) -> tuple[QuantizedLayer, Tensor]:
    """Every weight the largest or the smallest code, every activation the largest or zero."""
    module, shape = LAYERS[name]
    layer, generator = (
        quantized_layer(module, LayerPlan(weight_bits=bits, activation_bits=8)),
        torch.Generator().manual_seed(bits),
    )
    assert isinstance(layer, QuantizedLayer)
    grid = layer.plan.weight_grid
    # long runs of one sign: no neighbours cancel
    ends = torch.tensor([grid.quant_min, grid.quant_max])
    codes = ends[torch.randint(2, (layer.weight_shape[0], 1), generator=generator)].expand(
        layer.weight_shape[0], int(np.prod(layer.weight_shape[1:]))
    )
    scales = torch.rand(layer.weight_shape[0], generator=generator) * 0.02 + 0.001
    zero_point = torch.tensor(3, dtype=torch.int32)
    layer.set_parameters(codes.reshape(layer.weight_shape), scales, torch.tensor(0.037), zero_point)
    x = (torch.randint(2, shape, generator=generator) * 255.0 - 3) * 0.037
    return layer, x


def _error(layer: QuantizedLayer, x: Tensor) -> float:
    actual = OpenVinoEngine().compile_layer(layer, x, CPU)(x)
    layer.arithmetic = "integer"
    return relative_l2(actual, layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_found_out_holds_for_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left in bytes, a layer at the ends of its grids is exact where the processor is said to be, and only there."""
    layer, x = _at_the_ends(name, 8)
    is_exact = layer.operation.kind not in saturation.saturating_kinds()
    monkeypatch.setattr(saturation, "saturating_kinds", lambda: frozenset())
    assert (_error(layer, x) < 2e-6) == is_exact


@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exact_at_the_ends_of_their_grids(name: str, bits: int) -> None:
    assert _error(*_at_the_ends(name, bits)) < 2e-6


@pytest.mark.usefixtures("saturates")
@pytest.mark.parametrize("name", LAYERS)
def test_eight_bit_weights_are_exact_in_other_forms(name: str) -> None:
    layer, x = _at_the_ends(name, 8)
    assert OpenVinoEngine().layer_refusal(layer) is None, "it is compared with exact integers like all others"
    assert _error(layer, x) < 2e-6


@pytest.mark.usefixtures("saturates")
@pytest.mark.parametrize("name", LAYERS)
def test_seven_bit_weights_stay_integers(name: str) -> None:
    layer, x = _at_the_ends(name, 7)
    assert saturation.replace_saturating_products(_graph(layer, x), ALL) == frozenset()
    assert not saturation.weights_saturate(np.array([-64, 64], np.int8))
    assert saturation.weights_saturate(np.array([-65], np.int8))


@pytest.mark.parametrize(("name", "spared"), [("conv", set()), ("groups", set()), ("linear", {"layer"})])
def test_no_wide_code_is_left_and_nothing_else_is_touched(name: str, spared: set[str]) -> None:
    layer, x = _at_the_ends(name, 8)
    graph = _graph(layer, x)
    others = ALL - {layer.operation.kind}
    assert saturation.replace_saturating_products(graph, others) == frozenset()
    assert [codes.tolist() for codes in _codes(graph)] == [layer.weight_int.reshape(_codes(graph)[0].shape).tolist()]
    assert saturation.replace_saturating_products(graph, ALL) == spared
    assert len(_codes(graph)) == (0 if spared else 2)
    assert not any(map(saturation.weights_saturate, _codes(graph)))


def test_a_float_input_stays_as_it_is() -> None:
    layer, x = quantized_layer(LAYERS["conv"][0], LayerPlan(weight_bits=8)), torch.zeros(LAYERS["conv"][1])
    assert isinstance(layer, QuantizedLayer)
    layer.set_parameters(torch.full(layer.weight_shape, 127), torch.ones(layer.weight_shape[0]))
    graph = _graph(layer, x)
    assert saturation.replace_saturating_products(graph, ALL) == frozenset()
    assert len(_codes(graph)) == 1


def _codes(graph: ov.Model) -> list[np.ndarray]:
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    return [node.data for node in constants if node.get_output_element_type(0) == ov.Type.i8]


def test_what_was_found_out_holds_for_attention() -> None:
    """Products of queries and keys at the ends of their grids."""
    exact = relative_l2(*_product_of_ends(spared=frozenset())) < 2e-6
    assert exact == ("attention" not in saturation.saturating_kinds())
    assert relative_l2(*_product_of_ends(spared=ALL)) < 2e-6


def _product_of_ends(spared: frozenset[LayerKind]) -> tuple[Tensor, Tensor]:
    scale, grid = torch.tensor(0.0371), weight_grid(8)
    parameters = [ops.parameter([2, 24, 40], ov.Type.f32) for _ in range(2)]
    q, k = (nodes.fake_quantize(parameter.output(0), scale, None, grid) for parameter in parameters)
    graph = ov.Model([ops.matmul(q, ops.transpose(k, np.array([0, 2, 1])), False, False)], parameters)
    saturation.replace_saturating_products(graph, spared)
    signs = torch.randint(2, (2, 2, 24, 1), generator=torch.Generator().manual_seed(0)) * 255.0 - 128
    codes = signs.expand(2, 2, 24, 40).contiguous()
    actual = ov.Core().compile_model(graph, "CPU", plugin_properties(CPU))([*(codes * scale).numpy()])[0]
    return torch.from_numpy(actual.copy()), codes[0].double() @ codes[1].double().mT * scale**2


def _graph(layer: QuantizedLayer, x: Tensor) -> ov.Model:
    parameter = ops.parameter(list(x.shape), ov.Type.f32)
    return ov.Model([nodes.layer(parameter.output(0), layer, "layer")], [parameter])


@pytest.mark.usefixtures("saturates")
def test_a_whole_denoiser_says_what_stays_in_floating_point_and_why(tiny_sd: Path) -> None:
    from diffusers import DiffusionPipeline

    denoiser = DiffusionPipeline.from_pretrained(tiny_sd).unet
    args, kwargs = example_call(denoiser, batch_size=2)
    recipe = EVERYWHERE.model_copy(update={"output_float_input": True})
    quantize_to_nearest(denoiser, recipe, BitWidth.parse("w4a8"), [(args, kwargs)])
    use_arithmetic(denoiser, "integer")
    compiled = OpenVinoEngine().compile(denoiser, args, kwargs, CPU)
    with torch.no_grad():
        assert relative_l2(compiled(*args, **kwargs).sample, denoiser(*args, **kwargs).sample) < 0.1
    rows = compiled.layers
    assert {row.precision for row in rows if row.planned == "w4a8"} == {"int8"}
    wide = [row for row in rows if row.planned == "w8a8"]
    assert {row.kind for row in wide} == ALL
    assert {(row.precision, row.reason) for row in wide if row.kind == "conv2d"} == {("int8", None)}
    kept = {(row.precision, row.reason) for row in wide if row.kind != "conv2d"}
    assert kept == {("float32", saturation.REASON)}
