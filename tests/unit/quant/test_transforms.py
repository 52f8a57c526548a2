"""Transforms of a layer's input: the product does not change, the bound holds, and other packages may add their own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edadm_cli import plugins
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.onnx.engine import OnnxRuntimeEngine
from edadm_cli.engines.openvino.engine import OpenVinoEngine
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import EdadmError, MachineError, UsageError
from edadm_cli.quant import transforms
from edadm_cli.quant.grid import activation_grid, weight_grid
from edadm_cli.quant.histogram import Histogram
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.search import Range, activation_range, input_energy, weight_scales
from edadm_cli.quant.transforms import ChannelStatistics, InputChannelScale, Transform, dilation_bound, transform_named
from edadm_cli.recipe import RangeRecipe

SCALE = "input-channel-scale"


class Reverse(Transform):
    """A toy: reverses the order of the channels, which no factor per channel does."""

    name = "toy-reverse"
    tensors = ()

    def calibrate(
        self, weight: Tensor, statistics: ChannelStatistics, options: Mapping[str, float]
    ) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], channel_dim: int) -> Tensor:
        return x.float().flip(channel_dim)

    def fold(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return weight.flip(1)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(transforms._registered, Reverse.name, Reverse())
    return Reverse.name


def _float_layer(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Linear(12, 8), torch.randn(3, 5, 12) * torch.linspace(0.1, 4, 12)
    return nn.Conv2d(12, 8, 3, padding=1), torch.randn(2, 12, 6, 6) * torch.linspace(0.1, 4, 12)[:, None, None]


def _statistics(x: Tensor, dim: int) -> ChannelStatistics:
    rows = x.movedim(dim, 0).flatten(1)
    return ChannelStatistics(rows.square().mean(1), rows.abs().amax(1))


def _filled(kind: str, name: str) -> tuple[QuantizedLayer, nn.Module, Tensor]:
    layer, x = _float_layer(kind)
    plan = LayerPlan(weight_bits=8, activation_bits=8, transform=name)
    transform, dim = transform_named(name), 1 if kind == "conv2d" else -1
    tensors = transform.calibrate(layer.weight.detach(), _statistics(x, dim), transform.options)
    folded = transform.fold(layer.weight.detach(), tensors)
    scale = weight_scales(folded, plan.weight_grid, RangeRecipe())
    codes = (folded / scale.reshape(-1, *[1] * (folded.dim() - 1))).round().clamp(-128, 127).to(torch.int8)
    largest = transform.apply(x, tensors, dim).abs().max()
    quantized = quantized_layer(layer, plan)
    assert isinstance(quantized, QuantizedLayer)
    quantized.set_parameters(codes, scale, largest / 127, torch.tensor(128), **tensors)
    return quantized, layer, x


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", [SCALE, Reverse.name])
def test_a_transform_and_its_inverse_in_the_weight_leave_the_product(toy: str, kind: str, name: str) -> None:
    layer, x = _float_layer(kind)
    transform, dim = transform_named(name), 1 if kind == "conv2d" else -1
    tensors = transform.calibrate(layer.weight.detach(), _statistics(x, dim), transform.options)
    exact = layer(x)
    with torch.no_grad():
        layer.weight.copy_(transform.fold(layer.weight, tensors))
    torch.testing.assert_close(layer(transform.apply(x, tensors, dim)), exact, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_within_the_bound_no_output_channels_range_grows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 9, 3, 3, generator=generator)
    bound = dilation_bound(weight)
    assert bool((bound >= 1).all())
    dilated = weight * bound.reshape(-1, 1, 1)
    ranges = [w.abs().flatten(1).amax(1) for w in (weight, dilated)]
    torch.testing.assert_close(ranges[0], ranges[1])
    statistics = ChannelStatistics(torch.ones(9), torch.rand(9, generator=generator) * 100)
    scale = InputChannelScale().calibrate(weight, statistics, InputChannelScale.options)["input_channel_scale"]
    assert bool(((scale >= 1) & (scale <= bound)).all())


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_engines_compute_a_scaled_layer_as_the_reference_does(kind: str) -> None:
    quantized, layer, x = _filled(kind, SCALE)
    options = EngineOptions(device=torch.device("cpu"), rest_dtype=torch.float32)
    exact = ReferenceEngine().compile_layer(quantized, x, options)(x)
    torch.testing.assert_close(quantized(x), exact, atol=1e-4, rtol=1e-4)
    assert float((exact - layer(x)).norm().detach() / layer(x).norm().detach()) < 0.02
    for engine in (OnnxRuntimeEngine(), OpenVinoEngine()):
        assert engine.layer_refusal(quantized) is None
        torch.testing.assert_close(engine.compile_layer(quantized, x, options)(x), exact, atol=1e-4, rtol=1e-4)
    lowering = Lowering(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(lowering.product("layer", quantized)(x), quantized(x), atol=1e-5, rtol=1e-5)
    assert "transform 'input-channel-scale'" in str(lowering.decisions["layer"][1])


def test_engines_refuse_a_layer_whose_transform_they_do_not_have(toy: str) -> None:
    quantized, layer, x = _filled("linear", toy)
    options = EngineOptions(device=torch.device("cpu"), rest_dtype=torch.float32)
    exact = ReferenceEngine().compile_layer(quantized, x, options)(x)
    assert float((exact - layer(x)).norm().detach() / layer(x).norm().detach()) < 0.02
    for engine in (OnnxRuntimeEngine(), OpenVinoEngine()):
        assert "toy-reverse" in str(engine.layer_refusal(quantized))
        with pytest.raises(EdadmError, match="toy-reverse"):
            engine.compile_layer(quantized, x, options)
        with pytest.raises(MachineError, match=r"cannot run the layer '0' of Sequential: the transform 'toy-reverse'"):
            engine.compile(nn.Sequential(quantized), (x,), {}, options)
    lowering = Lowering(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(lowering.product("layer", quantized)(x), quantized(x), atol=1e-5, rtol=1e-5)


def test_a_transform_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("toy", f"{__name__}:Reverse", transforms.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Reverse)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    transforms._installed.cache_clear()
    try:
        assert isinstance(transform_named(Reverse.name), Reverse)
    finally:
        transforms._installed.cache_clear()


def test_an_unknown_transform_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no transform 'nothing'.*input-channel-scale"):
        transform_named("nothing")
    with pytest.raises(ValueError, match="no transform"):
        LayerPlan(weight_bits=4, transform=SCALE)


def test_scales_by_output_error_are_those_of_the_least_output_error() -> None:
    """Against brute force over outputs of inputs that are independent, and no worse than scales by weight error."""
    torch.manual_seed(3)
    weight, spread = torch.randn(5, 16), torch.logspace(-2, 1, 16)
    x = torch.randn(4000, 16) * spread
    energy = input_energy(spread.square(), weight)
    assert torch.equal(energy[2], spread.square())
    grid, recipe = weight_grid(3), RangeRecipe(weight="output-error")

    def output_error(scale: Tensor) -> Tensor:
        rounded = (weight / scale[:, None]).round().clamp(grid.quant_min, grid.quant_max) * scale[:, None]
        return (x @ (rounded - weight).T).square().mean(0)

    chosen = weight_scales(weight, grid, recipe, energy)
    plain = weight_scales(weight, grid, RangeRecipe())
    full = weight.abs().amax(1) / grid.quant_max
    best = torch.stack([output_error(full * step / 100) for step in range(1, 101)]).amin(0)
    assert bool((output_error(chosen) <= 1.1 * best).all())
    assert float(output_error(chosen).sum()) < float(output_error(plain).sum())


def test_each_group_of_a_convolution_meets_the_energy_of_its_own_channels() -> None:
    weight: Any = torch.zeros(4, 2, 3, 3)
    energy = input_energy(torch.tensor([1.0, 2.0, 3.0, 4.0]), weight, groups=2)
    assert energy.shape == weight.shape
    assert energy[0, :, 0, 0].tolist() == [1, 2]
    assert energy[3, :, 2, 2].tolist() == [3, 4]


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("channels", [64, 80, 6])
def test_a_rotation_changes_no_product(group: int, channels: int) -> None:
    rotation = transform_named(f"hadamard-{group}")
    generator = torch.Generator().manual_seed(0)
    tokens, matrix = (torch.randn(shape, generator=generator) for shape in ((2, 3, channels), (5, channels)))
    rotated = rotation.apply(tokens, {}, -1) @ rotation.fold(matrix, {}).T
    torch.testing.assert_close(rotated, tokens @ matrix.T, rtol=1e-4, atol=1e-4)
    image, kernel = (torch.randn(shape, generator=generator) for shape in ((2, channels, 5, 5), (4, channels, 3, 3)))
    convolved = nn.functional.conv2d(rotation.apply(image, {}, 1), rotation.fold(kernel, {}), padding=1)
    torch.testing.assert_close(convolved, nn.functional.conv2d(image, kernel, padding=1), rtol=1e-4, atol=1e-4)


def test_a_rotation_spreads_an_outlier_over_its_group() -> None:
    """Four-bit codes of one large channel leave nothing of the others; rotated, they share its size."""
    generator = torch.Generator().manual_seed(1)
    x, matrix = torch.randn(256, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x[:, 5] *= 30
    expected, errors, recipe = x @ matrix.T, {}, RangeRecipe()
    for name in (None, "hadamard-64"):
        linear = nn.Linear(64, 32, bias=False)
        layer = quantized_layer(linear, LayerPlan(weight_bits=8, activation_bits=4, transform=name))
        assert isinstance(layer, QuantizedLayer)
        rotation = None if name is None else transform_named(name)
        inputs, weight = (x, matrix) if rotation is None else (rotation.apply(x, {}, -1), rotation.fold(matrix, {}))
        low, high = activation_range(Histogram.of(inputs), activation_grid(4), recipe).tolist()
        scale, zero_point = Range(low, high).parameters(activation_grid(4))
        scales = weight_scales(weight, weight_grid(8), recipe)
        codes = (weight / scales[:, None]).round().clamp(-128, 127).to(torch.int8)
        layer.set_parameters(codes, scales, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
        errors[name] = float((layer(x) - expected).norm() / expected.norm())
    assert errors["hadamard-64"] < 0.7 * errors[None]


def test_the_energy_of_rotated_channels_is_the_mean_of_their_group() -> None:
    rotation, channels = transform_named("hadamard-16"), 32
    x = torch.randn(20_000, channels, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 4, channels)
    predicted = rotation.mean_square(ChannelStatistics(x.square().mean(dim=0), x.abs().amax(dim=0)), {})
    torch.testing.assert_close(rotation.apply(x, {}, -1).square().mean(dim=0), predicted, rtol=0.1, atol=0.0)


def test_a_compiled_rotation_has_its_matrix_as_a_constant() -> None:
    rotation, x, graphs = transform_named("hadamard-64"), torch.randn(3, 128), list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of torch.compile; imports may warn of other things
        rotated = torch.compile(lambda x: rotation.apply(x, {}, -1), backend=backend, fullgraph=True)(x)
    assert torch.equal(rotated, rotation.apply(x, {}, -1))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert not [name for name in called if "kron" in name or "tensor" in name or "div" in name], called
