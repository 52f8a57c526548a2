"""Attention in eight and in sixteen bits on CUDA: every cut against the reference and against floating point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edadm_kernels import attend, attend_int8, attend_on_grids, attend_takes, attend_to_codes, backend, reference
from edadm_kernels.attention_int8 import _codes
from edadm_kernels.backend import uses_hopper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HEADS = 3
SHAPES = [
    *((300, 300, 64), (64, 1000, 72), (256, 256, 72), (500, 129, 128), (129, 65, 40), (1, 1, 8), (70, 77, 80)),
    *((33, 200, 160), (1000, 128, 96), (200, 127, 24)),
]


def operands(
    queries: int, keys: int, width: int, dtype: torch.dtype, samples: int = 2, spread: float = 1.0
) -> list[Tensor]:
    """Heads of columns of larger products, as a denoiser has them, with channels that stick out."""
    generator = torch.Generator("cuda").manual_seed(queries + keys)
    q = spread * torch.randn(samples, queries, 3, HEADS, width, generator=generator, device="cuda")[:, :, 0]
    pair = torch.randn(samples, keys, 2, HEADS, width, generator=generator, device="cuda")
    pair[..., ::5] += 3
    return [x.to(dtype).transpose(1, 2) for x in (q, pair[:, :, 0], pair[:, :, 1])]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), SHAPES)
def test_codes_are_those_of_the_reference(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = operands(queries, keys, width, dtype)
    expected, codes = reference.attention_codes(q, k, v), _codes(q, k, v)
    for name in ("q_scale", "k_scale", "v_scale", "v_center", "q", "k", "v"):
        assert torch.equal(getattr(codes, name), getattr(expected, name)), name


@pytest.mark.parametrize("samples", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), SHAPES)
def test_int8_is_as_close_as_its_reference(
    queries: int, keys: int, width: int, dtype: torch.dtype, samples: int
) -> None:
    q, k, v = operands(queries, keys, width, dtype, samples)
    scale = 1 / math.sqrt(width)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    attended = attend_int8(q, k, v, scale)
    with backend("reference"):
        exact = attend_int8(q, k, v, scale)
    rounding = 4e-4 if dtype == torch.float16 else 3e-3
    assert attended.dtype == dtype
    assert attended.transpose(1, 2).is_contiguous()
    assert relative_l2(attended, expected) < 1.5 * relative_l2(exact, expected) + rounding
    assert relative_l2(attended, exact) < 0.01


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0])
@pytest.mark.parametrize(("queries", "keys", "width"), [(300, 700, 64), (300, 700, 72), (300, 700, 128)])
def test_flat_and_sharp_weights(queries: int, keys: int, width: int, spread: float) -> None:
    q, k, v = operands(queries, keys, width, torch.float16, spread=spread)
    attended = attend_int8(q, k, v, 1 / math.sqrt(width))
    with backend("reference"):
        exact = attend_int8(q, k, v, 1 / math.sqrt(width))
    assert relative_l2(attended, exact) < 0.02


def test_scores_that_grow_from_turn_to_turn() -> None:
    """What the weights refer to has to follow: the last keys come first, and their scores are the smallest."""
    q, k, v = (x.contiguous() for x in operands(200, 1024, 64, torch.float16))
    q.fill_(1.0)
    k.copy_(torch.linspace(4.0, -4.0, 1024, device="cuda").view(1, 1, -1, 1).expand_as(k))
    with backend("reference"):
        exact = attend_int8(q, k, v, 1.0)
    assert relative_l2(attend_int8(q, k, v, 1.0), exact) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), SHAPES)
def test_sixteen_bits(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = operands(queries, keys, width, dtype)
    scale = 1 / math.sqrt(width)
    assert attend_takes(q, k, v, scale) or not uses_hopper(q)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    assert relative_l2(attend(q, k, v, scale), expected) < (1e-3 if dtype == torch.float16 else 6e-3)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "first"),
    [(4096, 300, 72, 4096), (1357, 1357, 64, 1024), (333, 300, 64, 333), (700, 700, 128, 188), (65, 47, 40, 65)],
)
def test_codes_of_one_or_two_grids(queries: int, keys: int, width: int, first: int, has_bias: bool) -> None:
    q, k, v = operands(queries, keys, width, torch.float16)
    bias, mask = None, None
    if has_bias:
        hidden = torch.arange(keys, device="cuda") % 3 == 0
        bias = torch.where(hidden, -10000.0, 0.0).half().expand(*k.shape[:3])
        mask = bias[:, :, None].double()
    scale = 1 / math.sqrt(width)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale)
    assert relative_l2(attend(q, k, v, scale, bias), exact) < 1e-3
    rows = exact.transpose(1, 2).flatten(2).float()
    inverse, shift = 100 / rows.abs().max(), torch.tensor(-3.0, device="cuda")
    grids = [(inverse, shift, 8), (inverse / 2, shift + 5, 6)][: 1 + (first < queries)]
    outs = attend_to_codes(q, k, v, scale, *(list(column) for column in zip(*grids, strict=True)), first, bias)
    for out, piece, (step, zero, bits) in zip(outs, rows.split([first, queries - first], 1), grids, strict=False):
        target = (torch.round(piece * step) + zero).clamp(-128, (1 << bits) - 129)
        difference = (out.float() - target).abs()
        assert difference.max() <= 1
        assert difference.mean() < 0.05


@pytest.mark.parametrize("operation", [attend, attend_int8])
def test_it_repeats(operation: object) -> None:
    q, k, v = operands(1024, 1024, 72, torch.float16)
    first = operation(q, k, v, 0.1)  # type: ignore[operator]
    assert all(torch.equal(operation(q, k, v, 0.1), first) for _ in range(5))  # type: ignore[operator]


def test_rows_that_the_copies_do_not_take() -> None:
    q, k, v = (x[..., 1:] for x in operands(40, 50, 72, torch.float16))
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.1)
    assert relative_l2(attend(q, k, v, 0.1), expected) < 1e-3
    assert relative_l2(attend_int8(q, k, v, 0.1), expected) < 0.02


@pytest.mark.parametrize("bits", [(8, 8), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), SHAPES)
def test_a_models_own_grids(queries: int, keys: int, width: int, dtype: torch.dtype, bits: tuple[int, int]) -> None:
    q, k, v = operands(queries, keys, width, dtype)
    most = (1 << (bits[0] - 1)) - 1
    steps = [x.float().abs().amax().reshape(1) * 0.8 / most for x in (q, k, v)]
    steps.append(torch.full((1,), 4 / keys / ((1 << bits[1]) - 1), device="cuda"))
    scales = (steps[0], steps[1], steps[2], steps[3])
    exact = reference.attend_on_grids(q, k, v, 1 / math.sqrt(width), scales, bits).transpose(1, 2)
    attended = attend_on_grids(q, k, v, 1 / math.sqrt(width), scales, *bits)
    # a weight at the edge between two codes may be rounded to either of them
    assert relative_l2(attended, exact) < (1e-3 if dtype == torch.float16 else 6e-3)
