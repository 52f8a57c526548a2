"""Linear layers on integer codes: one kernel computes from codes to the input of the next layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_device, check_output_grid
from edadm_kernels.gemm_launch import launch_gemm, variants
from edadm_kernels.hopper import few_rows, matrices, product
from edadm_kernels.launching import arch_of, on_device_of
from edadm_kernels.operation import operation
from edadm_kernels.pointwise import quantize
from edadm_kernels.product_checks import check_addends, check_codes, check_epilogue, check_output
from edadm_kernels.tiles import choose

__all__ = ["linear", "linear_geglu", "linear_gelu", "linear_to_codes", "variants"]


def _empty_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Checks the arguments of `linear` and returns an empty output."""
    check_device(x, residual)
    check_matrices(x, weight, scale, correction, bias)
    check_addends(residual)
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(
            f"a contiguous residual of shape {tuple(out.shape)} is expected, found {tuple(residual.shape)} with "
            f"strides {residual.stride()}"
        )
    check_output(out_dtype, x, weight, out)
    return out


@operation("linear", empty=_empty_linear, reference=reference.linear)
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes a linear layer from codes.

        y[m, n] = (sum_k x[m, k] weight[n, k] - correction[n]) * scale[n] + bias[n] + residual[m, n]

    The sum is an exact int32; what follows is computed in float32 and rounded once, to `out_dtype`.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: The scale of the input times those of the weights, float32 `[N]`.
        correction: int32 `[N]`, from `pack.linear_correction`.
        bias: `[N]`, floating point.
        residual: `[M, N]`, floating point, contiguous.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        `[M, N]`, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty_linear(x, weight, scale, correction, bias, residual, out_dtype)
    fill_linear(x, weight, scale, correction, bias, residual, out)
    return out


def fill_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Fills `out` by the kernel that is expected to be the fastest; the arguments are those of `linear`, checked."""
    if uses_hopper(x) and _fill_on_hopper(x, weight, scale, correction, bias, residual, out):
        return
    packed = weight.dtype == torch.uint8
    tile = choose(arch_of(x), "linear", *out.shape, x.shape[1], packed=packed)
    with on_device_of(x):
        launch_gemm(tile, x, weight, scale, correction, bias, out, residual=residual)


def _fill_on_hopper(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> bool:
    """Fills `out` by a kernel in CUDA C++; returns false where none supports the operands."""
    if residual is None and few_rows.takes(x, weight, scale, correction, bias):
        few_rows.launch_few_rows(x, weight, scale, correction, bias, out)
        return True
    vectors = (scale, correction, residual)
    if (residual is None or residual.dtype == out.dtype) and matrices.takes(x, [weight], vectors, [bias], out.dtype):
        adds = residual is not None
        large = matrices.choose_over_single(x.shape[0], (weight.shape[0],), x.shape[1], adds=adds)
        if large is not None:
            addition = None if residual is None else matrices.Addition(residual)
            matrices.launch_matrices(large, x, [weight], [scale], [correction], [bias], [out], addition=addition)
            return True
    if not product.takes(x, weight, scale, correction, bias, out, residual=residual):
        return False
    shape = product.Shape.matrix(*x.shape)
    fast = product.choose("linear", shape, weight.shape[0])
    product.launch_product(fast, x, weight, scale, correction, bias, out, None, residual, shape)
    return True


def _empty_added(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Checks the arguments of `linear_to_codes` and returns an empty output."""
    check_output_grid(num_bits, out_scale, out_zero_point, x)
    y = _empty_linear(x, weight, scale, correction, bias, residual, residual.dtype)
    return torch.empty_like(y, dtype=torch.int8)


@operation("linear_to_codes", empty=_empty_added, reference=reference.linear_to_codes)
def linear_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `quantize(linear(...))` for a sum that only one quantized layer reads.

    The sum is rounded to the type of `residual` before it is quantized, so the codes are those of both operations.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: The scale of the input times those of the weights, float32 `[N]`.
        correction: int32 `[N]`, from `pack.linear_correction`.
        bias: `[N]`, floating point.
        residual: `[M, N]`, float16, bfloat16 or float32, contiguous.
        out_scale: The scale of the output's codes, float32, one element.
        out_zero_point: Their zero-point in the convention of unsigned codes, int32, one element.
        num_bits: Bits of the output's codes, 2 to 8.

    Returns:
        Codes `[M, N]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty_added(x, weight, scale, correction, bias, residual, out_scale, out_zero_point, num_bits)
    if uses_hopper(x) and product.takes(x, weight, scale, correction, bias, out, residual=residual):
        shape = product.Shape.matrix(*x.shape)
        tile = product.choose("linear", shape, weight.shape[0])
        grid = (out_scale, out_zero_point, 2**num_bits - 1)
        product.launch_product(tile, x, weight, scale, correction, bias, out, None, residual, shape, grid)
        return out
    y = torch.empty_like(residual)
    fill_linear(x, weight, scale, correction, bias, residual, y)
    return quantize(y, out_scale, out_zero_point, num_bits)


def _empty_codes(
    is_gated: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Checks the arguments of `linear_geglu` or `linear_gelu` and returns an empty output."""
    check_output_grid(num_bits, out_scale, out_zero_point, x)
    check_matrices(x, weight, scale, correction, bias)
    outputs = weight.shape[0]
    if is_gated and outputs % 2:
        raise ValueError(f"pairs of a value row and a gate row are expected, found {outputs} rows")
    out = x.new_empty((x.shape[0], outputs // 2 if is_gated else outputs), dtype=torch.int8)
    check_output(torch.float32, x, weight, out)
    return out


@operation("linear_geglu", empty=partial(_empty_codes, True), reference=reference.linear_geglu)
def linear_geglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes the gated half of a feed-forward layer, quantized for the next: `quantize(value * gelu(gate))`.

    Value and gate are columns 2j and 2j + 1 of `linear(...)` in float32; gelu is the exact one (erf).

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[2 F, K]` int8, or `[2 F, K / 2]` uint8, rows interleaved by `pack.pack_geglu`.
        scale: float32 `[2 F]`, interleaved.
        correction: int32 `[2 F]`, interleaved.
        bias: `[2 F]`, floating point, interleaved.
        out_scale: The scale of the output's codes, float32, one element.
        out_zero_point: Their zero-point in the convention of unsigned codes, int32, one element.
        num_bits: Bits of the output's codes, 2 to 8.

    Returns:
        Codes `[M, F]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.

    References:
        GEGLU, arXiv 2002.05202; GELU, arXiv 1606.08415.
    """
    out = _empty_codes(True, x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)
    geglu = (out_scale, out_zero_point, 2**num_bits - 1)
    large = None
    if uses_hopper(x) and _takes_large(x, weight, scale, correction, bias, out):
        large = matrices.choose_over_single(x.shape[0], (weight.shape[0],), x.shape[1], geglu=True)
    if large is not None:
        matrices.launch_matrices(large, x, [weight], [scale], [correction], [bias], [out], [geglu])
    elif uses_hopper(x) and product.takes(x, weight, scale, correction, bias, out):
        shape = product.Shape.matrix(*x.shape)
        fast = product.choose("geglu", shape, weight.shape[0])
        product.launch_product(fast, x, weight, scale, correction, bias, out, None, None, shape, geglu)
    else:
        packed = weight.dtype == torch.uint8
        tile = choose(arch_of(x), "geglu", x.shape[0], weight.shape[0], x.shape[1], packed=packed)
        with on_device_of(x):
            launch_gemm(tile, x, weight, scale, correction, bias, out, geglu=geglu)
    return out


@operation("linear_gelu", empty=partial(_empty_codes, False), reference=reference.linear_gelu)
def linear_gelu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes the first half of a feed-forward layer, quantized for the second: `quantize(gelu(linear(...)))`.

    gelu is the approximation by a hyperbolic tangent. Everything between the sums and the codes is float32.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: The scale of the input times those of the weights, float32 `[N]`.
        correction: int32 `[N]`, from `pack.linear_correction`.
        bias: `[N]`, floating point.
        out_scale: The scale of the output's codes, float32, one element.
        out_zero_point: Their zero-point in the convention of unsigned codes, int32, one element.
        num_bits: Bits of the output's codes, 2 to 8.

    Returns:
        Codes `[M, N]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.

    References:
        GELU, arXiv 1606.08415, section 2.
    """
    out = _empty_codes(False, x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)
    if uses_hopper(x) and _takes_large(x, weight, scale, correction, bias, out):
        tile = matrices.choose(x.shape[0], (weight.shape[0],), x.shape[1])
        gelu = (out_scale, out_zero_point, 2**num_bits - 1)
        matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], [gelu])
        return out
    y = x.new_empty(out.shape, dtype=torch.float32)
    fill_linear(x, weight, scale, correction, bias, None, y)
    return quantize(torch.nn.functional.gelu(y, approximate="tanh"), out_scale, out_zero_point, num_bits)


def _takes_large(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out: Tensor
) -> bool:
    """Returns whether the kernel for large matrices computes a product whose output is codes."""
    return matrices.takes_codes(out) and matrices.takes(x, [weight], (scale, correction), [bias], torch.float16)


def check_matrices(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> None:
    """Raises an error unless the operands of a linear layer have the stated types, shapes and layouts."""
    if x.ndim != 2 or weight.ndim != 2 or not x.is_contiguous():
        raise ValueError(
            f"contiguous codes [M, K] and weights [N, K] are expected, found {tuple(x.shape)} with strides "
            f"{x.stride()} and {tuple(weight.shape)}"
        )
    check_device(x, weight, scale, correction, bias)
    check_codes(x, weight, x.shape[1])
    check_epilogue(scale, correction, bias, (weight.shape[0],))
