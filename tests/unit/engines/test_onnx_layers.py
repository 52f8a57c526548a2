"""One quantized layer in ONNX: the standard file means the same codes, and ONNX Runtime sums them exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.base import EngineOptions
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan
from tests.unit.engines.graph_layers import LAYERS, filled

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from edadm_cli.engines.onnx import OnnxRuntimeEngine  # noqa: E402
from edadm_cli.engines.onnx.export import layer_graph, write  # noqa: E402
from edadm_cli.engines.onnx.integers import in_integers  # noqa: E402
from edadm_cli.engines.onnx.session import make_session  # noqa: E402

CPU = EngineOptions(torch.device("cpu"))


PLANS = {
    "w8a8": LayerPlan(weight_bits=8, activation_bits=8),
    "w4a8": LayerPlan(weight_bits=4, activation_bits=8),
    "w3a5": LayerPlan(weight_bits=3, activation_bits=5),
    "w2a2": LayerPlan(weight_bits=2, activation_bits=2),
}
WEIGHTS_ONLY = LayerPlan(weight_bits=4)
each_layer = pytest.mark.parametrize("name", LAYERS)
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def _input(name: str, layer: QuantizedLayer | None = None) -> Tensor:
    """Values beyond both ends of the grid; with a layer, none of them near the edge between two codes."""
    x = 2 * torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(11))
    if layer is None:
        return x
    return (torch.round(x / layer.input_scale) + 0.4 * torch.rand(x.shape)) * layer.input_scale


@torch.no_grad()
def _exact(layer: QuantizedLayer, x: Tensor) -> Tensor:
    layer.arithmetic = "integer"
    y: Tensor = layer(x)
    return y


@each_plan
@each_layer
def test_a_layer_is_bit_equal_to_exact_integers(name: str, plan: LayerPlan) -> None:
    layer, x = filled(name, plan), _input(name)
    assert OnnxRuntimeEngine().layer_refusal(layer) is None
    assert torch.equal(OnnxRuntimeEngine().compile_layer(layer, x, CPU)(x), _exact(layer, x))


@pytest.mark.parametrize("zero_point", [0, 255])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_padding_is_zero_whatever_the_zero_point(name: str, zero_point: int) -> None:
    layer, x = filled(name, PLANS["w8a8"], zero_point), _input(name)
    assert torch.equal(OnnxRuntimeEngine().compile_layer(layer, x, CPU)(x), _exact(layer, x))


def test_sums_do_not_saturate() -> None:
    """The largest codes everywhere: what products of uint8 and int8 get wrong that add pairs in 16 bits."""
    layer = quantized_layer(nn.Linear(64, 4, bias=False), PLANS["w8a8"])
    assert isinstance(layer, QuantizedLayer)
    layer.set_parameters(torch.full((4, 64), 127), torch.ones(4), torch.tensor(1.0), torch.tensor(0))
    x = torch.full((3, 64), 255.0)
    actual = OnnxRuntimeEngine().compile_layer(layer, x, CPU)(x)
    assert torch.equal(actual, torch.full((3, 4), 64.0 * 127 * 255))


@each_plan
@each_layer
def test_the_file_itself_means_the_same(name: str, plan: LayerPlan, tmp_path: Path) -> None:
    """As any runtime reads it: no rewriting, no optimizer, floating-point products of dequantized operands."""
    layer = filled(name, plan)
    path = tmp_path / "layer.onnx"
    write(layer_graph(layer, len(LAYERS[name][1])), path)
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    x = _input(name, layer)
    actual = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    expected = _exact(layer, x)
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_codes_of_the_file_differ_only_at_the_edge_of_rounding() -> None:
    """QuantizeLinear divides by the scale, the grid multiplies by its reciprocal: rarely another code, by one."""
    layer = quantized_layer(nn.Linear(1, 1, bias=False), PLANS["w8a8"])
    assert isinstance(layer, QuantizedLayer)
    layer.set_parameters(torch.ones(1, 1), torch.ones(1), torch.tensor(0.0123), torch.tensor(100))
    x = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    model = layer_graph(layer, 2)
    divided = make_session(model, None).run({"x": x}) / layer.input_scale
    in_integers(model)
    multiplied = make_session(model, None).run({"x": x}) / layer.input_scale
    difference = (divided - multiplied).round().abs()
    assert difference.max() <= 1
    assert difference.mean() < 1e-4
    assert torch.equal(multiplied * layer.input_scale, _exact(layer, x))


def test_weights_of_at_most_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    for plan, element, per_code in ((PLANS["w4a8"], "INT4", 0.5), (PLANS["w8a8"], "INT8", 1)):
        layer = filled("conv", plan)
        path = tmp_path / f"{element}.onnx"
        write(layer_graph(layer, 4), path)
        tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
        weight = tensors["layer.weight"]
        assert weight.data_type == onnx.TensorProto.DataType.Value(element)
        assert len(weight.raw_data) == -(-layer.weight_int.numel() * per_code // 1)
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(weight).astype("int8")), layer.weight_int)
        assert tuple(tensors["layer.weight_scale"].dims) == (7,)


def test_a_large_graph_keeps_its_tensors_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edadm_cli.engines.onnx.export._LARGEST_INLINE", 0)
    layer = quantized_layer(nn.Linear(256, 64), PLANS["w4a8"])
    assert isinstance(layer, QuantizedLayer)
    codes = torch.randint(-8, 8, (64, 256))
    layer.set_parameters(codes, torch.rand(64) + 0.1, torch.tensor(0.02), torch.tensor(100))
    path = tmp_path / "layer.onnx"
    write(layer_graph(layer, 2), path)
    assert 64 * 256 / 2 <= (tmp_path / "layer.onnx.data").stat().st_size < 64 * 256 * 0.6
    onnx.checker.check_model(str(path))
    model = ir.load(path)
    in_integers(model)
    x = torch.randn(3, 256)
    assert torch.equal(make_session(model, 1).run({"x": x}), _exact(layer, x))


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_layer_with_a_float_input_multiplies_dequantized_weights(name: str) -> None:
    layer, x = filled(name, WEIGHTS_ONLY), _input(name)
    engine = OnnxRuntimeEngine()
    assert engine.layer_refusal(layer) == "its input is not quantized"
    expected = layer(x).detach()
    actual = engine.compile_layer(layer, x, CPU)(x)
    assert float((actual - expected).norm() / expected.norm()) < 1e-6
