"""Normalized and rotated heads, in plain torch: what the kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join_heads(
    first: Tensor,
    second: Tensor | None,
    heads: int,
    weights: Sequence[Tensor],
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Returns what `edadm_kernels.join_heads` computes, in float64 and rounded once to the type of `first`."""
    rows = [x.double().unflatten(-1, (heads, -1)) for x in (first, second) if x is not None]
    if weights:
        rows = [_normalized(x, weight, eps) for x, weight in zip(rows, weights, strict=True)]
    joined = torch.cat(rows, dim=1)
    if cos is not None and sin is not None:
        even, odd = joined.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        joined = joined * cos.double()[:, None] + turned * sin.double()[:, None]
    return joined.to(first.dtype)


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns `x` divided by the root mean square of each head, times the weight."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.double()
