"""Attention in eight bits: codes by Triton's interpreter against the reference, and the reference against floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edadm_kernels import attend_int8, attend_on_grids, attention_int8, launching, reference
from edadm_kernels.attention_int8 import _codes, _grid_codes
from edadm_kernels.reference.attention import keys_of
from tests.kernels.operands import Grids


def operands(
    samples: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """Heads of columns of larger products, with channels and tokens that stick out."""
    generator = torch.Generator().manual_seed(queries * keys + width)
    q = torch.randn(samples, queries, 3, heads, width, generator=generator)[:, :, 1]
    pair = torch.randn(samples, keys, 2, heads, width, generator=generator)
    pair[..., ::5] += 4
    pair[:, ::7] *= 3
    return [x.to(dtype).transpose(1, 2) for x in (q, pair[:, :, 0], pair[:, :, 1])]


@pytest.mark.parametrize(("samples", "heads", "queries", "keys", "width"), [(2, 2, 5, 130, 72), (1, 1, 129, 3, 40)])
def test_codes_of_the_kernels_are_those_of_the_reference(
    samples: int, heads: int, queries: int, keys: int, width: int
) -> None:
    q, k, v = operands(samples, heads, queries, keys, width)
    expected, codes = reference.attention_codes(q, k, v), _codes(q, k, v)
    for name in ("q_scale", "k_scale", "v_scale", "v_center", "q", "k", "v"):
        assert torch.equal(getattr(codes, name), getattr(expected, name)), name


def test_more_heads_than_fit_one_grid_are_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(5, 2, 4, 3, 8)
    scales = tuple(torch.tensor([scale]) for scale in (0.03, 0.04, 0.05, 0.01))
    whole = _codes(q, k, v), _grid_codes(q, k, v, scales, 8)
    monkeypatch.setattr(launching, "MAX_GRID_ROWS", 5)
    parts = _codes(q, k, v), _grid_codes(q, k, v, scales, 8)
    for name in ("q_scale", "k_scale", "v_scale", "v_center", "q", "k", "v"):
        assert torch.equal(getattr(parts[0], name), getattr(whole[0], name)), name
    for name in ("q_scale", "k_scale", "v_scale", "q", "k", "v"):
        assert torch.equal(getattr(parts[1], name), getattr(whole[1], name)), name


def test_no_grid_is_larger_than_a_gpu_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.zeros(2 * 64 * 64, 8, 2, 8).half()
    kernels = {name: Grids() for name in ("extremes_kernel", "codes_kernel", "grid_codes_kernel")}
    for name, grids in kernels.items():
        monkeypatch.setattr(attention_int8, name, grids)
    _codes(frames, frames, frames)
    _grid_codes(frames, frames, frames, (torch.ones(1),) * 4, 8)
    for grids in kernels.values():
        assert sum(grid[1] for grid in grids.seen) == 2 * 64 * 64 * 8
        assert max(grid[1] for grid in grids.seen) <= 65_535


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scales": (torch.ones(1),) * 3 + (torch.ones(1).half(),)}, TypeError),
        ({"scales": (torch.ones(2),) + (torch.ones(1),) * 3}, ValueError),
        ({"scales": (torch.ones(1, device="meta"),) + (torch.ones(1),) * 3}, ValueError),
        ({"operand_bits": 9}, ValueError),
        ({"weight_bits": 9}, ValueError),
    ],
)
def test_grids_that_a_kernel_would_misread_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    q, k, v = operands(1, 2, 4, 3, 8)
    grids: dict[str, Any] = {"scales": (torch.ones(1),) * 4, **change}
    with pytest.raises(error, match="expected, found"):
        attend_on_grids(q, k, v, 0.3, **grids)


def test_every_key_has_one_slot() -> None:
    order = keys_of(64)
    assert sorted(order.tolist()) == list(range(64))
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_close_to_attention_in_floating_point(dtype: torch.dtype) -> None:
    q, k, v = operands(2, 3, 40, 200, 64, dtype)
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.125)
    attended = attend_int8(q, k, v, 0.125)
    assert attended.dtype == dtype
    assert attended.shape == q.shape
    assert attended.transpose(1, 2).is_contiguous()
    error = (attended.float() - expected).norm() / expected.norm()
    assert error < 0.03


def test_what_all_keys_share_costs_no_precision() -> None:
    """A constant in each channel of the keys moves no softmax, and one of the values moves the result by itself."""
    q, k, v = operands(1, 2, 30, 150, 32, torch.float32)
    shift = 100 * torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0))
    expected = scaled_dot_product_attention(q, k, v, scale=0.2)
    error = (attend_int8(q, k + shift, v + shift, 0.2) - shift - expected).norm() / expected.norm()
    assert error < 0.03


def test_values_that_are_all_equal_are_exact() -> None:
    q, k, _ = operands(1, 1, 9, 20, 8)
    v = torch.full_like(k, 0.37)
    assert torch.equal(attend_int8(q, k, v, 1 / math.sqrt(8)), torch.full_like(q, 0.37))


def test_wrong_operands_are_named() -> None:
    q, k, v = operands(1, 2, 4, 6, 16)
    with pytest.raises(ValueError, match="keys and values"):
        attend_int8(q, k, v[..., :8], 1.0)
    with pytest.raises(ValueError, match="contiguous channels"):
        attend_int8(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, 1.0)
    with pytest.raises(TypeError, match="one type"):
        attend_int8(q, k, v.float(), 1.0)
