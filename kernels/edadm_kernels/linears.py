"""Several linear layers on integer codes in one launch: layers of one input, or each layer with a separate input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_device, check_output_grid
from edadm_kernels.gemm import check_matrices, fill_linear, linear, linear_gelu
from edadm_kernels.hopper import few_rows, matrices
from edadm_kernels.operation import operation
from edadm_kernels.product_checks import check_codes, check_epilogue, check_output, side_by_side

__all__ = ["linear_joined", "linear_stack", "linears", "linears_gelu"]


def _empty_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Checks the arguments of `linears` and returns empty outputs."""
    if not weights:
        raise ValueError("weights of at least one layer are expected, found none")
    outs = []
    for weight, scale, correction, bias in zip(weights, scales, corrections, biases, strict=True):
        check_matrices(x, weight, scale, correction, bias)
        out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
        check_output(out_dtype, x, weight, out)
        outs.append(out)
    return outs


@operation("linears", empty=_empty_linears, reference=reference.linears)
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Computes `linear` of one input with several weights.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weights: Codes `[N, K]`, int8 or packed, of each layer.
        scales: float32 `[N]` of each layer.
        corrections: int32 `[N]` of each layer.
        biases: `[N]`, floating point, or `None`, of each layer.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        `[M, N]` of each layer, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    outs = _empty_linears(x, weights, scales, corrections, biases, out_dtype)
    if uses_hopper(x) and matrices.takes(x, weights, (*scales, *corrections), biases, out_dtype):
        tile = matrices.choose_over_single(x.shape[0], tuple(weight.shape[0] for weight in weights), x.shape[1])
        if tile is not None:
            matrices.launch_matrices(tile, x, weights, scales, corrections, biases, outs)
            return outs
    for out, weight, scale, correction, bias in zip(outs, weights, scales, corrections, biases, strict=True):
        fill_linear(x, weight, scale, correction, bias, None, out)
    return outs


def _empty_linears_gelu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
    out_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Checks the arguments of `linears_gelu` and returns empty outputs."""
    check_output_grid(num_bits, out_scale, out_zero_point, x)
    *outs, last = _empty_linears(x, weights, scales, corrections, biases, out_dtype)
    return [*outs, x.new_empty(last.shape, dtype=torch.int8)]


@operation("linears_gelu", empty=_empty_linears_gelu)
def linears_gelu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
    out_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Computes `linears` whose last member is `linear_gelu`: activated, and quantized for the layer that follows it.

    Args:
        x: As in `linears`, and so `weights`, `scales`, `corrections` and `biases`.
        out_scale: As in `linear_gelu`, and so `out_zero_point` and `num_bits`.
        out_dtype: The element type of the outputs of the other members.

    Returns:
        `[M, N]` of each layer, contiguous; codes, int8, of the last.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    members = (weights, scales, corrections, biases)
    outs = _empty_linears_gelu(x, *members, out_scale, out_zero_point, num_bits, out_dtype)
    is_written = uses_hopper(x) and matrices.takes_codes(outs[-1])
    if is_written and matrices.takes(x, weights, (*scales, *corrections), biases, out_dtype):
        tile = matrices.choose(x.shape[0], tuple(weight.shape[0] for weight in weights), x.shape[1])
        gelus = [*[None] * (len(weights) - 1), (out_scale, out_zero_point, 2**num_bits - 1)]
        matrices.launch_matrices(tile, x, *members, outs, gelus)
        return outs
    *plain, gelu = zip(*members, strict=True)
    codes = linear_gelu(x, *gelu, out_scale, out_zero_point, num_bits)
    return [*(linear(x, *member, out_dtype=out_dtype) for member in plain), codes]


def _empty_joined(
    x: Tensor,
    more: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Checks the arguments of `linear_joined` and returns an empty output."""
    check_device(x, more)
    check_matrices(side_by_side(x, more), weight, scale, correction, bias)
    out = x.new_empty((len(x), weight.shape[0]), dtype=out_dtype)
    check_output(out_dtype, x, weight, out)
    return out


@operation("linear_joined", empty=_empty_joined)
def linear_joined(
    x: Tensor,
    more: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes `linear` of two inputs side by side without copying them into one tensor.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        more: Codes `[M, L]`, int8, contiguous.
        weight: Codes `[N, K + L]`, int8 or packed.
        scale: float32 `[N]`.
        correction: int32 `[N]`.
        bias: `[N]`, floating point.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        `[M, N]`, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty_joined(x, more, weight, scale, correction, bias, out_dtype)
    has_both = x.shape[1] > 0 and more.shape[1] > 0
    fills_steps = has_both and uses_hopper(x) and x.shape[1] % matrices.MOST_CHANNELS == 0
    if fills_steps and matrices.takes(more, [weight], (x, scale, correction), [bias], out_dtype):
        tile = matrices.choose(x.shape[0], (weight.shape[0],), x.shape[1] + more.shape[1])
        matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], more=more)
        return out
    return linear(torch.cat([x, more], dim=1), weight, scale, correction, bias, out_dtype=out_dtype)


def _empty_stack(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Checks the arguments of `linear_stack` and returns an empty output."""
    if x.ndim != 3 or weight.ndim != 3 or len(x) != len(weight) or not x.is_contiguous():
        raise ValueError(
            f"contiguous codes [S, M, K] and weights [S, N, K] are expected, found {tuple(x.shape)} with strides "
            f"{x.stride()} and {tuple(weight.shape)}"
        )
    if weight.dtype != torch.int8:
        raise TypeError(f"int8 weights are expected, found {weight.dtype}")
    check_device(x, weight, scale, correction, bias)
    if not weight.is_contiguous():
        raise ValueError("contiguous weights are expected; call .contiguous() on them first")
    check_codes(x, weight.flatten(0, 1), x.shape[2])
    check_epilogue(scale, correction, bias, (weight.shape[0], weight.shape[1]))
    out = x.new_empty((len(x), x.shape[1], weight.shape[1]), dtype=out_dtype)
    check_output(out_dtype, x, weight, out)
    return out


@operation("linear_stack", empty=_empty_stack, reference=reference.linear_stack)
def linear_stack(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes linear layers of equal sizes, each with a separate input; it is meant for inputs of few rows.

    Args:
        x: Codes `[S, M, K]`, int8, contiguous.
        weight: Codes `[S, N, K]`, int8, contiguous.
        scale: float32 `[S, N]`, contiguous.
        correction: int32 `[S, N]`, contiguous.
        bias: `[S, N]`, floating point, contiguous.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        `[S, M, N]`, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty_stack(x, weight, scale, correction, bias, out_dtype)
    if uses_hopper(x) and few_rows.takes(x, weight, scale, correction, bias):
        few_rows.launch_few_rows(x, weight, scale, correction, bias, out)
        return out
    biases = [None] * len(x) if bias is None else list(bias)
    for layer in zip(x, weight, scale, correction, biases, out, strict=True):
        inputs, rows, scales, corrections, layer_bias, layer_out = layer
        fill_linear(inputs, rows, scales, corrections, layer_bias, None, layer_out)
    return out
