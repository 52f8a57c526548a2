"""Linear layers whose outputs are scaled per sample and added to a residual, as the gates of transformers do."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_device
from edadm_kernels.gemm import check_matrices, fill_linear
from edadm_kernels.hopper import matrices
from edadm_kernels.operation import operation
from edadm_kernels.product_checks import check_output, on_meta, side_by_side

__all__ = ["added_pays", "linear_added"]

MIN_ELEMENTS = 1 << 22
"""The least number of outputs for which an addition of its own takes longer than one inside of the product."""
_TILE_ROWS, _ALIGNMENT = 128, 16


def _empty(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    factor: Tensor | None = None,
    more: Tensor | None = None,
) -> Tensor:
    """Checks the arguments of `linear_added` and returns an empty output."""
    check_device(x, residual, factor, more)
    check_matrices(x if more is None else side_by_side(x, more), weight, scale, correction, bias)
    shape = (x.shape[0], weight.shape[0])
    if residual.shape != shape or not residual.is_contiguous():
        raise ValueError(
            f"a contiguous residual of shape {shape} is expected, found {tuple(residual.shape)} with strides "
            f"{residual.stride()}"
        )
    if factor is not None:
        if factor.dtype != residual.dtype:
            raise TypeError(
                f"factors in the type of the residual, {residual.dtype}, are expected, found {factor.dtype}"
            )
        fits = factor.ndim == 2 and factor.shape[1] == shape[1] and factor.shape[0] > 0
        if not fits or factor.stride(1) != 1 or shape[0] % factor.shape[0]:
            raise ValueError(
                f"rows of {shape[1]} factors for equal parts of {shape[0]} rows are expected, found "
                f"{tuple(factor.shape)} with strides {factor.stride()}"
            )
    out = torch.empty_like(residual)
    check_output(residual.dtype, x, weight, out)
    return out


@operation("linear_added", empty=_empty, reference=reference.linear_added)
def linear_added(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    factor: Tensor | None = None,
    more: Tensor | None = None,
) -> Tensor:
    """Computes `residual + factor * linear(...)`, where each sample has a row of factors.

    The sum is rounded once, to the type of the residual; everything before it is float32.

    Args:
        x: Codes `[M, K]`, int8, contiguous. The first `M / samples` rows are those of the first sample, and so on.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: The scale of the input times those of the weights, float32 `[N]`.
        correction: int32 `[N]`, from `pack.linear_correction`.
        bias: `[N]`, floating point.
        residual: `[M, N]`, float16, bfloat16 or float32, contiguous.
        factor: `[samples, N]` in the type of the residual, with contiguous rows; `None` stands for ones.
        more: Codes `[M, L]`, int8, contiguous, of columns that follow those of `x`; weights then have K + L columns.

    Returns:
        `[M, N]` in the type of the residual, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty(x, weight, scale, correction, bias, residual, factor, more)
    if uses_hopper(x) and _takes(x, weight, scale, correction, bias, residual, factor, more):
        tile = matrices.choose(x.shape[0], (weight.shape[0],), weight.shape[1], adds=True)
        addition = matrices.Addition(residual, factor)
        matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], more=more, addition=addition)
        return out
    x = x if more is None else torch.cat([x, more], dim=1)
    y = x.new_empty(out.shape, dtype=torch.float32)
    fill_linear(x, weight, scale, correction, bias, None, y)
    return out.copy_(reference.added(y, residual, factor))


def added_pays(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    factor: Tensor | None = None,
    more: Tensor | None = None,
) -> bool:
    """Returns whether `linear_added` is one launch that is faster than a product and an addition by themselves.

    The arguments are those of the operation; they may be tensors without elements, as torch has them while it traces.
    """
    if not uses_hopper(x) or residual.numel() < MIN_ELEMENTS:
        return False
    operands = (x, weight, scale, correction, bias, residual, factor, more)
    return _takes(*(None if tensor is None else on_meta(tensor) for tensor in operands))  # type: ignore[arg-type]


def _takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    factor: Tensor | None,
    more: Tensor | None,
) -> bool:
    """Returns whether the kernel for large matrices adds such a residual, scaled by such factors."""
    vectors = (scale, correction, residual, factor, more)
    if not matrices.takes(x, [weight], vectors, [bias], residual.dtype):
        return False
    if more is not None and (x.shape[1] % matrices.MOST_CHANNELS or more.shape[1] % _ALIGNMENT):
        return False
    if factor is None:
        return True
    # a tile has the rows of one sample, and its factors are copied in pieces of 16 bytes
    is_tiled = factor.shape[0] == 1 or x.shape[0] // factor.shape[0] % _TILE_ROWS == 0
    return is_tiled and factor.stride(0) * factor.itemsize % _ALIGNMENT == 0
