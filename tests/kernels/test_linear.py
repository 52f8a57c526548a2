"""Linear layers through Triton's interpreter: sums exact, floats equal to the reference, codes within one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_kernels import (
    backend,
    linear,
    linear_added,
    linear_geglu,
    linear_geglu_to_codes,
    linear_gelu,
    linear_gelu_to_codes,
    linear_to_codes,
    quantize,
    reference,
    uses_kernel,
)
from edadm_kernels.gemm_launch import launch_gemm
from edadm_kernels.pack import CODE_OFFSET, linear_correction, pack_geglu, pack_w4
from edadm_kernels.reference.products import accumulate_linear
from edadm_kernels.tiles import Tile
from tests.kernels.operands import random, random_codes

SMALL = {"bm": 32, "bn": 32, "num_warps": 4, "num_stages": 1}


class Layer:
    """Codes, packed where they have four bits, with all operands of the epilogue."""

    def __init__(self, m: int, n: int, k: int, *, zero_point: int = 100, packed: bool = False, seed: int = 0) -> None:
        self.x = random_codes(m, k, seed=seed)
        codes = random_codes(n, k, seed=seed + 1, limit=8 if packed else 128)
        self.weight = pack_w4(codes) if packed else codes
        self.scale = random(n, seed=seed + 2).abs() * 1e-3
        self.correction = linear_correction(codes, zero_point)
        self.bias = random(n, seed=seed + 3)
        self.residual = random(m, n, seed=seed + 4).half()

    def sums(self, tile: Tile) -> Tensor:
        """The parts of a split product, from a poisoned buffer."""
        m, n = self.x.shape[0], self.weight.shape[0]
        kept: list[Tensor] = []

        def poisoned(tile: Tile, m: int, n: int, device: torch.device) -> Tensor:
            kept.append(torch.full((tile.split_k, m, n), -(2**31), dtype=torch.int32))
            return kept[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edadm_kernels.gemm_launch.partial_sums", poisoned)
            out = torch.empty(m, n)
            launch_gemm(tile, self.x, self.weight, self.scale, self.correction, None, out)
        return kept[0]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal, but for bfloat16: the interpreter truncates to it, so one unit (2^-7 of the value) may be missing."""
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    if actual.dtype == torch.bfloat16:
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(actual, expected)


@settings(max_examples=12)
@given(
    m=st.integers(1, 40),
    n=st.sampled_from([1, 3, 32, 40]),
    k=st.sampled_from([1, 31, 64, 100, 128]),
    split_k=st.integers(2, 3),
    seed=st.integers(0, 99),
)
def test_sums_are_exact(m: int, n: int, k: int, split_k: int, seed: int) -> None:
    layer = Layer(m, n, k, seed=seed)
    parts = layer.sums(Tile(bk=64, split_k=split_k, **SMALL))
    assert torch.equal(parts.sum(0).double(), accumulate_linear(layer.x, layer.weight))


@pytest.mark.parametrize("k", [64, 128, 192, 256])
def test_sums_of_packed_weights_are_exact(k: int) -> None:
    layer = Layer(33, 35, k, packed=True)
    parts = layer.sums(Tile(bk=128 if k % 128 == 0 else 64, split_k=2, **SMALL))
    assert torch.equal(parts.sum(0).double(), accumulate_linear(layer.x, layer.weight))


@pytest.mark.parametrize("x_code", [-128, 127])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_saturated_inputs_do_not_overflow(x_code: int, zero_point: int) -> None:
    k = 23_040
    x = torch.full((1, k), x_code, dtype=torch.int8)
    weight = torch.full((2, k), -128, dtype=torch.int8)
    ones = torch.ones(2)
    y = linear(x, weight, ones, linear_correction(weight, zero_point), out_dtype=torch.float32)
    exact = (x_code + 128 - zero_point) * -128 * k
    assert torch.equal(y, torch.full((1, 2), float(exact)))


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 3, 7), (5, 32, 64), (33, 40, 100)])
@pytest.mark.parametrize("added", [False, True])
def test_linear_equals_the_reference(out_dtype: torch.dtype, shape: tuple[int, int, int], added: bool) -> None:
    layer = Layer(*shape)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction)
    if added:
        arguments += (layer.bias, layer.residual)
    assert_equal(linear(*arguments, out_dtype=out_dtype), reference.linear(*arguments, out_dtype=out_dtype))


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("k", [64, 128])
def test_packed_linear_equals_the_reference(zero_point: int, k: int) -> None:
    layer = Layer(20, 40, k, zero_point=zero_point, packed=True)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias, layer.residual)
    assert_equal(linear(*arguments), reference.linear(*arguments))


@pytest.mark.parametrize("split_k", [1, 2, 3])
@pytest.mark.parametrize("column_parts", [1, 2, 4])
def test_every_cut_gives_the_same(split_k: int, column_parts: int) -> None:
    layer = Layer(40, 45, 160)
    out = torch.full((40, 45), float("nan"), dtype=torch.float16)
    tile = Tile(bk=64, split_k=split_k, column_parts=column_parts, **SMALL)
    launch_gemm(tile, layer.x, layer.weight, layer.scale, layer.correction, layer.bias, out, residual=layer.residual)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias, layer.residual)
    assert_equal(out, reference.linear(*arguments))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("out_scale", "out_zero_point", "num_bits"), [(0.02, 120, 8), (0.001, 0, 8), (0.3, 15, 4)])
def test_geglu_is_within_one_code(packed: bool, out_scale: float, out_zero_point: int, num_bits: int) -> None:
    layer = Layer(21, 44, 128, packed=packed)
    quantizer = (torch.tensor(out_scale), torch.tensor(out_zero_point, dtype=torch.int32), num_bits)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias, *quantizer)
    actual, expected = linear_geglu(*arguments), reference.linear_geglu(*arguments)
    assert actual.dtype == torch.int8
    assert expected.unique().numel() > 2
    assert (actual.int() - expected.int()).abs().max() <= 1
    assert (actual != expected).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_of_a_sum_are_those_of_the_rounded_sum(dtype: torch.dtype) -> None:
    layer = Layer(21, 44, 128)
    residual = torch.randn(21, 44, generator=torch.Generator().manual_seed(1)).to(dtype)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias, residual)
    y = linear(*arguments, out_dtype=dtype)
    quantizer = (y.float().std().reshape(1) / 50, torch.tensor([90], dtype=torch.int32))
    expected = quantize(y, *quantizer)
    assert expected.unique().numel() > 50
    assert torch.equal(linear_to_codes(*arguments, *quantizer), expected)
    assert torch.equal(reference.linear_to_codes(*arguments, *quantizer), expected)


def test_gelu_of_numbers_beyond_float16_is_within_one_code() -> None:
    """In float16 they are infinite, and the GELU of minus infinity is no number."""
    layer = Layer(4, 6, 64)
    arguments = (layer.x, layer.weight, layer.scale * 1e5, layer.correction, layer.bias)
    quantizer = (torch.tensor([2e4]), torch.tensor([50], dtype=torch.int32))
    largest = reference.linear(*arguments, out_dtype=torch.float32)
    assert largest.min() < -65504 < 65504 < largest.max()
    actual, expected = linear_gelu(*arguments, *quantizer), reference.linear_gelu(*arguments, *quantizer)
    assert expected.unique().numel() > 3
    assert (actual.int() - expected.int()).abs().max() <= 1


def inverse(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """A grid as a layer of a loaded export holds it."""
    return scale.reciprocal(), zero_point.float() - CODE_OFFSET


@pytest.mark.parametrize("compute", [linear_gelu_to_codes, reference.linear_gelu_to_codes])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_gelu_on_the_grid_of_a_loaded_layer(compute: Callable[..., Tensor], num_bits: int) -> None:
    layer = Layer(33, 40, 64)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias)
    grid = (torch.tensor([0.02 if num_bits == 8 else 0.2]), torch.tensor([9], dtype=torch.int32))
    actual, expected = (
        compute(*arguments, *inverse(*grid), num_bits),
        reference.linear_gelu(*arguments, *grid, num_bits),
    )
    assert expected.unique().numel() > 6
    assert (actual.int() - expected.int()).abs().max() <= 1
    assert int((actual != expected).sum()) <= 1


@pytest.mark.parametrize("compute", [linear_geglu_to_codes, reference.linear_geglu_to_codes])
def test_gated_rows_in_the_order_of_a_layer(compute: Callable[..., Tensor]) -> None:
    layer = Layer(33, 40, 64)
    grid = (torch.tensor([0.05]), torch.tensor([120], dtype=torch.int32))
    vectors = (layer.scale, layer.correction, layer.bias)
    actual = compute(layer.x, layer.weight, *vectors, *inverse(*grid))
    alternating = [pack_geglu(values) for values in (layer.weight, *vectors)]
    expected = reference.linear_geglu(layer.x, *alternating, *grid)
    assert expected.unique().numel() > 8
    assert (actual.int() - expected.int()).abs().max() <= 1
    assert int((actual != expected).sum()) <= 1


@pytest.mark.parametrize("compute", [linear_added, reference.linear_added])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_a_product_is_scaled_per_sample_and_added(
    compute: Callable[..., Tensor], dtype: torch.dtype, samples: int
) -> None:
    layer = Layer(33, 40, 64)
    residual = layer.residual.to(dtype)
    factors = random(samples, 3 * 40, seed=9).to(dtype)[:, 40:80] if samples else None
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias)
    actual = compute(*arguments, residual, factors)
    y = reference.linear(*arguments, out_dtype=torch.float32)
    if factors is not None:
        y = y * factors.float().repeat_interleave(33 // samples, dim=0)
    assert actual.dtype == dtype
    assert torch.equal(actual, (residual.float() + y).to(dtype))


def test_factors_that_do_not_fit() -> None:
    layer = Layer(33, 40, 64)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias, layer.residual)
    with pytest.raises(ValueError, match="equal parts of 33 rows"):
        linear_added(*arguments, torch.ones(2, 40).half())
    with pytest.raises(TypeError, match=r"found torch\.float32"):
        linear_added(*arguments, torch.ones(3, 40))


def test_a_row_of_gates_is_missing() -> None:
    layer = Layer(4, 5, 64)
    with pytest.raises(ValueError, match="found 5 rows"):
        linear_geglu_to_codes(
            layer.x, layer.weight, layer.scale, layer.correction, layer.bias, torch.ones(1), torch.zeros(1)
        )


def test_nothing_in_nothing_out() -> None:
    layer = Layer(1, 8, 32)
    assert linear(layer.x[:0], layer.weight, layer.scale, layer.correction).shape == (0, 8)


def test_the_backend_is_chosen() -> None:
    x = torch.zeros(1)
    assert uses_kernel(x)
    with backend("reference"):
        assert not uses_kernel(x)
        with backend("triton"):
            assert uses_kernel(x)
    with pytest.raises(ValueError, match="found 'cuda'"), backend("cuda"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    layer = Layer(5, 6, 64, packed=packed)
    arguments = (layer.x, layer.weight, layer.scale, layer.correction, layer.bias)
    residual = layer.residual[:5, :6].contiguous()
    torch.library.opcheck(torch.ops.edadm.linear.default, (*arguments, residual, torch.float16))
    quantizer = (torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    torch.library.opcheck(torch.ops.edadm.linear_geglu.default, (*arguments, *quantizer, 8))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(5, 64)}, TypeError, "int8 activations"),
        ({"x": torch.zeros(64, 5, dtype=torch.int8).T}, ValueError, "contiguous codes"),
        ({"weight": torch.zeros(6, 65, dtype=torch.int8)}, ValueError, "64 input channels"),
        ({"weight": torch.zeros(64, 6, dtype=torch.int8).T}, ValueError, "contiguous weights"),
        ({"scale": torch.ones(6).double()}, TypeError, "float32 scale"),
        ({"scale": torch.ones(5)}, ValueError, "scale and bias"),
        ({"correction": torch.zeros(5, dtype=torch.int32)}, ValueError, "correction of shape"),
        ({"bias": torch.zeros(12)[::2]}, ValueError, "contiguous scale"),
        ({"residual": torch.zeros(6, 5).T}, ValueError, "contiguous residual"),
        ({"residual": torch.zeros(5, 6, dtype=torch.int8)}, TypeError, "biases and residuals"),
        ({"bias": torch.zeros(6, dtype=torch.int32)}, TypeError, "biases and residuals"),
        ({"out_dtype": torch.int8}, TypeError, "output is expected"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], text: str) -> None:
    layer = Layer(5, 6, 64)
    arguments = {
        "x": layer.x,
        "weight": layer.weight,
        "scale": layer.scale,
        "correction": layer.correction,
        "bias": layer.bias,
        "residual": layer.residual,
    }
    with pytest.raises(error, match=text):
        linear(**(arguments | change))  # type: ignore[arg-type]


def test_sums_that_could_overflow_are_refused() -> None:
    x = torch.zeros(1, 65_793, dtype=torch.int8)
    with pytest.raises(ValueError, match="65792 products"):
        linear(x, x, torch.ones(1), torch.zeros(1, dtype=torch.int32))
