"""Heads that are normalized, joined and rotated: equal to the reference but for float32's rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edadm_kernels import join_heads, join_heads_takes, reference


def tokens(length: int, channels: int, seed: int) -> Tensor:
    return torch.randn(2, length, channels, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("second", [0, 4])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_heads_equal_the_reference(second: int, norm: bool, rotates: bool) -> None:
    heads, width, first = 3, 16, 5
    pieces = [tokens(first, heads * width, 0)] + [tokens(second, heads * width, 1)] * bool(second)
    weights = [torch.randn(width).half() for _ in pieces] if norm else []
    angles = torch.randn(first + second, width // 2).repeat_interleave(2, dim=1)
    rotation = (angles.cos(), angles.sin()) if rotates else (None, None)
    arguments = (pieces[0], pieces[1] if second else None, heads, weights, 1e-6, *rotation)
    assert join_heads_takes(pieces[0], heads)
    out, expected = join_heads(*arguments), reference.join_heads(*arguments)
    assert out.shape == (2, first + second, heads, width)
    torch.testing.assert_close(out, expected, rtol=2**-10, atol=2**-14)  # half an ulp of float16, and float32's sums


def test_rows_may_be_columns_of_a_larger_product() -> None:
    wide = tokens(5, 3 * 32, 2)
    pieces = [wide[..., 32:64]]
    assert torch.equal(join_heads(pieces[0], None, 2, [], 0.0), pieces[0].unflatten(-1, (2, 16)))


def test_another_width_is_computed_by_the_reference() -> None:
    piece = tokens(3, 24, 3)
    assert not join_heads_takes(piece, 2)
    assert torch.equal(join_heads(piece, piece, 2, [], 0.0), torch.cat([piece, piece], dim=1).unflatten(-1, (2, 12)))


def test_rotations_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rotations of shape \(3, 16\)"):
        join_heads(tokens(3, 32, 4), None, 2, [], 0.0, torch.ones(4, 16), torch.ones(4, 16))
