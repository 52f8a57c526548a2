"""Quantized layers: two arithmetics that agree, exact integer sums, and scales that survive casts and files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.quant.grid import quantize
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.network import load_quant_params, quant_params
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.split_layer import SplitLayer


@dataclass(frozen=True)
class Case:
    layer: nn.Module
    shape: tuple[int, ...]

    @property
    def channel_dim(self) -> int:
        return 1 if isinstance(self.layer, nn.Conv2d) else -1


def _conv(channels: int, out: int, *, bias: bool = True, **kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(channels * 31 + out)
    return nn.Conv2d(channels, out, bias=bias, **{"kernel_size": 3, "padding": 1, **kwargs})


def _linear(channels: int, out: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(channels * 37 + out)
    return nn.Linear(channels, out, bias=bias)


CASES = {
    "conv": Case(_conv(5, 7), (2, 5, 9, 11)),
    "stride": Case(_conv(4, 6, stride=2), (2, 4, 9, 8)),
    "stride, padded outside": Case(_conv(4, 6, stride=2, padding=0), (2, 4, 9, 9)),
    "pointwise": Case(_conv(6, 3, kernel_size=1, padding=0, bias=False), (1, 6, 5, 5)),
    "groups": Case(_conv(6, 9, groups=3), (2, 6, 7, 7)),
    "dilation": Case(_conv(3, 4, dilation=2, padding=(2, 1)), (2, 3, 9, 9)),
    "linear": Case(_linear(13, 5), (7, 13)),
    "tokens": Case(_linear(12, 8, bias=False), (2, 6, 12)),
}
PLANS = {
    "w8a8": LayerPlan(weight_bits=8, activation_bits=8),
    "w4a8": LayerPlan(weight_bits=4, activation_bits=8),
    "w3a5": LayerPlan(weight_bits=3, activation_bits=5),
    "weights only": LayerPlan(weight_bits=4),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def _filled(layer: QuantizedLayer, zero_point: int | None = None, seed: int = 0) -> QuantizedLayer:
    """Returns random codes of the whole grid, a scale per channel, and a zero-point off the middle."""
    generator, grid = torch.Generator().manual_seed(seed), layer.plan.weight_grid
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, layer.weight_shape, generator=generator)
    scales = torch.rand(layer.weight_shape[0], generator=generator) * 0.02 + 0.001
    if layer.plan.input_grid is None:
        layer.set_parameters(codes.to(torch.int8), scales)
        return layer
    input_scale = torch.tensor(4.0 / layer.plan.input_grid.quant_max)
    zero = layer.plan.input_grid.quant_max // 3 if zero_point is None else zero_point
    layer.set_parameters(codes.to(torch.int8), scales, input_scale, torch.tensor(zero))
    return layer


def _quantized(case: Case, plan: LayerPlan, zero_point: int | None = None) -> QuantizedLayer:
    layer = quantized_layer(case.layer, plan)
    assert isinstance(layer, QuantizedLayer)
    return _filled(layer, zero_point)


def _input(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def _in_arithmetic(layer: QuantizedLayer, arithmetic: Any, x: Tensor) -> Tensor:
    layer.arithmetic = arithmetic
    y: Tensor = layer(x)
    return y


@each_plan
@each_case
def test_integer_arithmetic_means_the_same_as_fake_quantize(case: Case, plan: LayerPlan) -> None:
    layer, x = _quantized(case, plan), _input(case.shape)
    fake, integer = (_in_arithmetic(layer, name, x) for name in ("fake-quantize", "integer"))
    assert fake.shape == case.layer(x).shape
    assert float((integer - fake).norm() / fake.norm()) < 1e-5


@each_case
@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("zero_point", [0, 85, 255])
def test_integer_sums_are_exact(case: Case, zero_point: int, bits: str) -> None:
    """The sums, redone in int64 over unfolded patches; zero padding is real zero whatever the zero-point."""
    layer, x = _quantized(case, PLANS[bits], zero_point), _input(case.shape)
    grid = layer.plan.input_grid
    assert grid is not None
    codes = quantize(x, layer.input_scale, layer.input_zero_point, grid).long() - zero_point
    sums = _exact_sums(codes, layer.weight_int.long(), layer)
    per_channel = layer.operation.per_channel
    expected = sums.float() * per_channel(layer.input_scale * layer.weight_scale)
    expected = expected if layer.bias is None else expected + per_channel(layer.bias)
    assert torch.equal(_in_arithmetic(layer, "integer", x), expected)


@pytest.mark.parametrize("length", [8224, 8225, 20_001])
def test_sums_of_whole_numbers_are_exact_whatever_their_size(length: int) -> None:
    """The largest codes of W4A8: sums up to 2^24 in float32, and larger ones in float64."""
    weight = torch.full((3, length), -8.0)
    weight[1, ::2], weight[2, -1] = 7, 1
    codes = torch.full((5, length), 255.0)
    sums = Operation("linear").exact(codes, weight, 8 * 255)
    assert torch.equal(sums.long(), codes.long() @ weight.long().T)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_sums_of_whole_numbers_are_exact_without_onednn() -> None:
    """As on a Mac, where torch would compute a convolution of 16 images by transforms that round."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (8, 64, 3, 3), generator=generator)
    codes = torch.randint(-255, 256, (16, 64, 8, 8), generator=generator)
    convolution = Operation("conv2d", padding=(1, 1))
    with torch.backends.mkldnn.flags(enabled=False):
        sums = convolution.exact(codes, weight, 8 * 255)
    assert torch.equal(sums.double(), convolution(codes.double(), weight.double()))


def _exact_sums(codes: Tensor, weight: Tensor, layer: QuantizedLayer) -> Tensor:
    operation = layer.operation
    if operation.kind == "linear":
        return (codes[..., None, :] * weight).sum(dim=-1)
    (ph, pw), (sh, sw), (dh, dw) = operation.padding, operation.stride, operation.dilation
    padded = F.pad(codes, (pw, pw, ph, ph))
    kh, kw = weight.shape[2:]
    oh, ow = ((padded.shape[2 + i] - (operation.dilation[i] * (weight.shape[2 + i] - 1) + 1)) for i in (0, 1))
    groups = []
    for inputs, kernels in zip(padded.chunk(operation.groups, dim=1), weight.chunk(operation.groups), strict=True):
        total = 0
        for i in range(kh):
            for j in range(kw):
                window = inputs[:, :, i * dh : i * dh + oh + 1 : sh, j * dw : j * dw + ow + 1 : sw]
                total = total + (window[:, None] * kernels[None, :, :, i, j, None, None]).sum(dim=2)
        groups.append(total)
    return torch.cat(groups, dim=1)


def test_the_float_weight_is_codes_times_scales() -> None:
    case = CASES["conv"]
    layer, x = _quantized(case, PLANS["weights only"]), _input(case.shape)
    weight = layer.weight_int.float() * layer.weight_scale.reshape(-1, 1, 1, 1)
    assert torch.equal(layer(x), F.conv2d(x, weight, layer.bias, padding=1))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_split_layer_is_the_sum_of_its_parts(kind: str) -> None:
    base = _conv(10, 4) if kind == "conv" else _linear(10, 4)
    x = _input((2, 10, 6, 6) if kind == "conv" else (3, 5, 10))
    plan = LayerPlan(weight_bits=4, activation_bits=8, channel_parts=(7, 3))
    split = quantized_layer(base, plan)
    assert isinstance(split, SplitLayer)
    parts = [part for part in split.parts if isinstance(part, QuantizedLayer)]
    for seed, part in enumerate(parts):
        _filled(part, seed=seed)
    assert [part.weight_shape[1] for part in parts] == [7, 3]
    assert [part.bias is None for part in parts] == [False, True], "the bias is added once"
    pieces = x.split((7, 3), dim=1 if kind == "conv" else -1)
    assert torch.equal(split(x), parts[0](pieces[0]) + parts[1](pieces[1]))
    # both parts on one grid are the undivided layer
    whole = _filled(QuantizedLayer(parts[0].operation, plan.part(), tuple(base.weight.shape), base.bias))
    codes = whole.weight_int.split((7, 3), dim=1)
    for part, piece in zip(parts, codes, strict=True):
        part.set_parameters(piece, whole.weight_scale, whole.input_scale, whole.input_zero_point)
    torch.testing.assert_close(split(x), whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_cast_leaves_scales_alone(kind: str, dtype: torch.dtype) -> None:
    case = CASES[kind]
    layer = _quantized(case, PLANS["w4a8"])
    before, x = copy.deepcopy(layer), _input(case.shape)
    layer(x)  # fills the cache of the float weight, which must not survive the cast
    cast = nn.Sequential(layer).to(dtype)[0]
    assert isinstance(cast, QuantizedLayer)
    for name, tensor in before.named_buffers():
        assert torch.equal(dict(cast.named_buffers())[name], tensor)
        assert dict(cast.named_buffers())[name].dtype == tensor.dtype
    assert cast.bias is not None
    assert cast.bias.dtype == dtype
    actual = cast(x.to(dtype))
    assert actual.dtype == dtype
    expected = before(x.to(dtype).float())
    assert float((actual.float() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps
    narrow = _in_arithmetic(cast, "integer", x.to(dtype))
    assert narrow.dtype == dtype


def test_a_layer_moves_between_devices_without_its_cached_weight() -> None:
    layer, x = _quantized(CASES["conv"], PLANS["weights only"]), _input(CASES["conv"].shape)
    expected = layer(x)
    moved = layer.to("meta")
    assert all(tensor.is_meta for tensor in (*moved.buffers(), *moved.parameters()))
    assert moved(x.to("meta")).shape == expected.shape


@each_plan
def test_a_state_dict_restores_a_layer(plan: LayerPlan) -> None:
    case, x = CASES["conv"], _input(CASES["conv"].shape)
    layer = _quantized(case, plan)
    other = quantized_layer(_conv(5, 7), plan)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {name for name, _ in (*layer.named_buffers(), *layer.named_parameters())}


@each_case
def test_sizes_are_read_as_those_of_the_layer_that_was(case: Case) -> None:
    layer = _quantized(case, PLANS["w4a8"])
    names = ("in_channels", "out_channels") if isinstance(case.layer, nn.Conv2d) else ("in_features", "out_features")
    assert [getattr(layer, name) for name in names] == [getattr(case.layer, name) for name in names]


def test_new_codes_replace_the_cached_weight() -> None:
    layer, x = _quantized(CASES["linear"], PLANS["w4a8"]), _input(CASES["linear"].shape)
    first = layer(x)
    _filled(layer, seed=5)
    assert not torch.equal(layer(x), first)


def test_codes_of_at_most_four_bits_take_half_a_byte() -> None:
    for plan, per_code in ((PLANS["w4a8"], 0.5), (PLANS["w8a8"], 1)):
        layer = quantized_layer(_linear(64, 16), plan)
        assert isinstance(layer, QuantizedLayer)
        codes = layer.state_dict()["weight_codes"]
        assert codes.numel() * codes.element_size() == 64 * 16 * per_code


def test_what_is_not_a_layer_is_refused() -> None:
    for layer in (nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding_mode="circular", padding=1)):
        with pytest.raises(TypeError, match="zero-padded"):
            quantized_layer(layer, PLANS["w8a8"])


class TestParametersOfANetwork:
    def _network(self) -> nn.Module:
        layers = [_quantized(CASES["conv"], PLANS["w4a8"]), _quantized(CASES["linear"], PLANS["w8a8"])]
        return nn.Sequential(*layers)

    def test_they_are_read_and_written_under_the_names_of_the_artifact(self) -> None:
        network, x = self._network(), _input(CASES["conv"].shape)
        params = quant_params(network)
        assert set(params) == {
            f"{index}.{name}"
            for index in (0, 1)
            for name in ("weight_int", "weight_scale", "input_scale", "input_zero_point")
        }
        other = self._network()
        for layer in other:
            assert isinstance(layer, QuantizedLayer)
            _filled(layer, seed=9)
        load_quant_params(other, {name: tensor.clone() for name, tensor in params.items()})
        assert torch.equal(other[0](x), network[0](x))

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda p: p.pop("0.weight_scale"), "lack '0.weight_scale'"),
            (lambda p: p.update(other=torch.ones(1)), "unknown tensor 'other'"),
            (lambda p: p.update({"0.weight_scale": torch.ones(3)}), r"shape \[3\], expected is \[7\]"),
            (lambda p: p["0.weight_scale"].fill_(float("nan")), "not a positive number"),
            (lambda p: p["1.input_scale"].zero_(), "not a positive number"),
            (lambda p: p["0.weight_int"].fill_(8), "codes outside -8..7"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change: Any, sentence: str) -> None:
        from edadm_cli.errors import InputError

        params = {name: tensor.clone() for name, tensor in quant_params(self._network()).items()}
        change(params)
        with pytest.raises(InputError, match=sentence):
            load_quant_params(self._network(), params)
