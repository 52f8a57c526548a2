"""Products with an activation or a residual on a GPU: sums exact, floats equal, codes within one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm_kernels import (
    linear_added,
    linear_geglu,
    linear_geglu_to_codes,
    linear_gelu,
    linear_gelu_to_codes,
    reference,
)
from edadm_kernels.backend import uses_hopper
from edadm_kernels.hopper import matrices, product
from edadm_kernels.pack import linear_correction, pack_geglu
from tests.gpu.operands import CUDA, codes, epilogue, normal, poison

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize(
    "shape",
    [(8192, 1536, 6144), (8192, 1536, 1536), (8192, 1152, 4608), (4352, 3072, 3072), (512, 72, 16), (66, 45, 100)],
)
def test_a_product_is_scaled_per_sample_and_added(
    shape: tuple[int, int, int], samples: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    m, n, k = shape
    x, weight = codes((m, k), generator), codes((n, k), generator)
    scale, bias = epilogue(n, generator)
    residual = normal((m, n), generator).to(dtype)
    factors = normal((samples, 6 * n), generator).to(dtype)[:, n : 2 * n] if samples else None
    arguments = (x, weight, scale, linear_correction(weight, 131), bias.float(), residual, factors)
    poison((m, n), dtype)
    assert torch.equal(linear_added(*arguments), reference.linear_added(*arguments))


@pytest.mark.parametrize("shape", [(4352, 3072, 15360, 3072), (384, 136, 1152, 128), (40, 24, 64, 32)])
def test_a_product_of_two_inputs_is_added(shape: tuple[int, int, int, int], generator: torch.Generator) -> None:
    m, n, k, first = shape
    x, weight = codes((m, k), generator), codes((n, k), generator)
    scale, bias = epilogue(n, generator)
    residual, factor = normal((m, n), generator).half(), normal((1, n), generator).half()
    vectors = (weight, scale, linear_correction(weight, 131), bias.float(), residual, factor)
    actual = linear_added(x[:, :first].contiguous(), *vectors, x[:, first:].contiguous())
    assert torch.equal(actual, reference.linear_added(x, *vectors))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernels need 9.0"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", matrices.ADDING, ids=lambda tile: tile.label())
def test_every_tile_that_adds_a_residual(
    tile: matrices.MatrixTile, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for m, n, k, samples in [(8192, 1536, 1536, 2), (17152, 640, 1136, 0), (384, 72, 16, 3), (300, 3000, 4608, 1)]:
        x, weight = codes((m, k), generator), codes((n, k), generator)
        scale, bias = epilogue(n, generator)
        correction = linear_correction(weight, 7)
        residual = normal((m, n), generator).to(dtype)
        factors = normal((samples, n), generator).to(dtype) if samples else None
        out = torch.full_like(residual, float("nan"))
        operands = ([weight], [scale], [correction], [bias.float()])
        for _ in range(2):
            matrices.launch_matrices(tile, x, *operands, [out], addition=matrices.Addition(residual, factors))
        expected = reference.linear_added(x, weight, scale, correction, bias.float(), residual, factors)
        assert torch.equal(out, expected), (m, n, k)


@pytest.mark.parametrize(
    "shape", [(8192, 4608, 1152), (8858, 6144, 1536), (666, 6144, 1536), (300, 328, 1136), (130, 16, 16), (33, 46, 100)]
)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_gelu_on_the_grid_of_a_loaded_layer(
    shape: tuple[int, int, int], num_bits: int, generator: torch.Generator
) -> None:
    m, n, k = shape
    x, weight = codes((m, k), generator), codes((n, k), generator)
    scale, bias = epilogue(n, generator)
    out_scale = torch.tensor([0.05], device=CUDA)
    zero_point = torch.tensor([3 if num_bits == 4 else 20], dtype=torch.int32, device=CUDA)
    arguments = (x, weight, scale * 0.1, linear_correction(weight, 100), bias.float())
    poison((m, n), torch.int8)
    actual = linear_gelu_to_codes(*arguments, out_scale.reciprocal(), zero_point.float() - 128, num_bits)
    expected = reference.linear_gelu(*arguments, out_scale, zero_point, num_bits)
    assert expected.unique().numel() > 4
    assert (actual.int() - expected.int()).abs().max() <= 1
    is_fused = k % 16 == 0 and n % 16 == 0
    assert int((actual != expected).sum()) <= 1 + (1e-3 if is_fused else 2e-2) * actual.numel()
    if uses_hopper(x) and is_fused:
        assert torch.equal(actual, linear_gelu(*arguments, out_scale, zero_point, num_bits)), "the same kernel"


GATED = [(8192, 2560, 320), (2048, 10240, 1280), (8192, 5120, 640), (128, 10240, 1280), (300, 1152, 1136), (77, 40, 48)]


@pytest.mark.parametrize("shape", [*GATED, (33, 46, 100)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_gated_rows_in_the_order_of_a_layer(
    shape: tuple[int, int, int], bias: bool, num_bits: int, generator: torch.Generator
) -> None:
    m, n, k = shape
    x, weight = codes((m, k), generator), codes((n, k), generator)
    scale, added = epilogue(n, generator)
    vectors = (scale, linear_correction(weight, 100), added.float() if bias else None)
    out_scale = torch.tensor([0.05], device=CUDA)
    zero_point = torch.tensor([3 if num_bits == 4 else 120], dtype=torch.int32, device=CUDA)
    poison((m, n // 2), torch.int8)
    actual = linear_geglu_to_codes(x, weight, *vectors, out_scale.reciprocal(), zero_point.float() - 128, num_bits)
    alternating = [None if values is None else pack_geglu(values) for values in (weight, *vectors)]
    expected = reference.linear_geglu(x, *alternating, out_scale, zero_point, num_bits)
    assert expected.unique().numel() > 4
    assert (actual.int() - expected.int()).abs().max() <= 1
    assert int((actual != expected).sum()) <= 1 + 1e-3 * actual.numel()
    if uses_hopper(x) and k % 16 == 0:
        assert torch.equal(actual, linear_geglu(x, *alternating, out_scale, zero_point, num_bits)), "the same kernel"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernels need 9.0"
)
@pytest.mark.parametrize("shape", [*GATED, (130, 2576, 1280)])
def test_every_tile_of_gated_rows_in_the_order_of_a_layer(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    m, n, k = shape
    x, weight = codes((m, k), generator), codes((n, k), generator)
    scale, bias = epilogue(n, generator)
    vectors = (scale, linear_correction(weight, 100), bias.float())
    grid = (torch.tensor([20.0], device=CUDA), torch.tensor([-8.0], device=CUDA), 255)
    expected = reference.linear_geglu_to_codes(x, weight, *vectors, *grid[:2])
    form = product.Shape.matrix(m, k)
    for tile in product.candidates("geglu", form):
        out = torch.full_like(expected, 99)
        ordered = replace(tile, gates_last=True)
        product.launch_product(ordered, x, weight, *vectors, out, None, None, form, grid)
        assert (out.int() - expected.int()).abs().max() <= 1, tile
        assert int((out != expected).sum()) <= 1 + 1e-3 * out.numel(), tile
    if n // 2 % 16 == 0:
        out = torch.full_like(expected, 99)
        operands = ([weight], *([vector] for vector in vectors))
        matrices.launch_matrices(replace(matrices.GATED, gates_last=True), x, *operands, [out], [grid])
        assert (out.int() - expected.int()).abs().max() <= 1
        assert int((out != expected).sum()) <= 1 + 1e-3 * out.numel()
