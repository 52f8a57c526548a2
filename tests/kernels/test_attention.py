"""Attention to codes against the reference, by Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edadm_kernels import attend_to_codes, attention, attention_quantize, backend, launching, reference
from edadm_kernels.attention import MAX_HEAD_WIDTH, _pieces, _tile
from edadm_kernels.launching import PROGRAM_SHARED_BYTES
from tests.kernels.operands import Grids

SCALE = torch.tensor([0.013])
ZERO_POINT = torch.tensor([120], dtype=torch.int32)


def operands(samples: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Queries, keys and values as columns of larger products, as the engine has them."""
    generator = torch.Generator().manual_seed(queries * keys + width)
    q = torch.randn(samples, queries, 3 * width, generator=generator).to(dtype)[..., width : 2 * width]
    pair = torch.randn(samples, keys, 2 * width, generator=generator).to(dtype)
    return [q, pair[..., :width], pair[..., width:]]


# Queries of a sample fill a tile or not; keys fill less than one step of the loop, several, or end inside one; heads of
# 8, 16, 40, 64, 80 and 160 channels are narrower than an instruction, a power of two, or two pieces.
@pytest.mark.parametrize(
    ("samples", "queries", "keys", "heads", "width"),
    [
        (1, 40, 77, 2, 40),
        (1, 17, 64, 1, 160),
        (2, 20, 33, 2, 16),
        (1, 9, 5, 2, 8),
        (1, 33, 130, 1, 80),
        (1, 4, 3, 3, 64),
        (1, 5, 70, 1, 256),
    ],
)
def test_kernel_agrees_with_the_reference(samples: int, queries: int, keys: int, heads: int, width: int) -> None:
    q, k, v = operands(samples, queries, keys, heads * width)
    arguments = (q, k, v, heads, 1 / math.sqrt(width), SCALE, ZERO_POINT, 8)
    actual = attention_quantize(*arguments)
    with backend("reference"):
        expected = attention_quantize(*arguments)
    assert actual.shape == q.shape
    assert actual.is_contiguous()
    apart = (actual.int() - expected.int()).abs()
    # weights of the values are rounded to float16, so a result may cross the edge between two codes
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01
    assert expected.unique().numel() > 10


def test_codes_are_those_of_torchs_attention() -> None:
    q, k, v = operands(2, 12, 9, 32, torch.float32)
    split = [x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v)]
    attended = scaled_dot_product_attention(split[0], split[1], split[2], scale=0.3).transpose(1, 2).flatten(2)
    expected = reference.quantize(attended, SCALE, ZERO_POINT)
    actual = attention_quantize(q, k, v, 4, 0.3, SCALE, ZERO_POINT)
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_more_heads_than_fit_one_grid_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(5, 4, 3, 16)
    whole = attention_quantize(q, k, v, 2, 0.3, SCALE, ZERO_POINT)
    monkeypatch.setattr(launching, "MAX_GRID_ROWS", 5)
    assert torch.equal(attention_quantize(q, k, v, 2, 0.3, SCALE, ZERO_POINT), whole)


def test_no_grid_is_larger_than_a_gpu_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over the 8 frames of a video has a sample per pixel of the latents: 2 rows of 64 by 64."""
    grids = Grids()
    monkeypatch.setattr(attention, "attention_kernel", grids)
    frames = torch.zeros(2 * 64 * 64, 8, 8 * 8).half()
    attention_quantize(frames, frames, frames, 8, 0.3, SCALE, ZERO_POINT)
    assert sum(grid[1] for grid in grids.seen) == len(frames) * 8
    assert max(grid[1] for grid in grids.seen) <= 65_535


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"inverse_scales": [torch.tensor(2.0).double()]}, TypeError),
        ({"shifts": [torch.tensor(3)]}, TypeError),
        ({"shifts": [torch.zeros(2)]}, ValueError),
        ({"inverse_scales": [torch.ones(1, device="meta")]}, ValueError),
        ({"num_bits": [9]}, ValueError),
    ],
)
def test_codes_refuse_a_grid_that_a_kernel_would_misread(change: dict[str, Any], error: type[Exception]) -> None:
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in operands(1, 3, 4, 16))
    grid: dict[str, Any] = {"inverse_scales": [torch.ones(1)], "shifts": [torch.zeros(1)], "num_bits": [8]}
    with pytest.raises(error, match="expected, found"):
        attend_to_codes(q, k, v, 0.3, **{**grid, **change}, first=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits(bits: int) -> None:
    q, k, v = operands(1, 8, 8, 16)
    zero_point = torch.tensor([1 << (bits - 1)], dtype=torch.int32)
    actual = attention_quantize(q, k, v, 1, 0.25, torch.tensor([0.3]), zero_point, bits) + 128
    assert actual.to(torch.uint8).max() < 1 << bits


def test_wrong_operands_are_named() -> None:
    q, k, v = operands(1, 8, 8, 32)
    with pytest.raises(ValueError, match="with 5 heads"):
        attention_quantize(q, k, v, 5, 1.0, SCALE, ZERO_POINT)
    with pytest.raises(ValueError, match="keys and values"):
        attention_quantize(q, k, v[:, :4], 2, 1.0, SCALE, ZERO_POINT)
    with pytest.raises(TypeError, match="one floating-point type"):
        attention_quantize(q, k.float(), v, 2, 1.0, SCALE, ZERO_POINT)
    with pytest.raises(ValueError, match="evenly spaced rows"):
        attention_quantize(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 2, 1.0, SCALE, ZERO_POINT)


def test_heads_of_every_width_fit_every_architecture() -> None:
    sizes = itertools.product(PROGRAM_SHARED_BYTES, range(1, MAX_HEAD_WIDTH + 1), (1, 600, 5000), (1, 77, 200))
    for arch, width, queries, keys in sizes:
        tile, pieces = _tile(arch, width, queries, keys), _pieces(width)
        padded = pieces["HEAD"] + pieces["TAIL"]
        assert width <= padded
        assert (tile["BM"] + 4 * tile["BN"]) * 2 * padded <= PROGRAM_SHARED_BYTES[arch]
        assert min(tile.values()) >= 16
