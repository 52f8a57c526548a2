"""Linear layers on integer codes: one kernel from codes to the next layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper, uses_kernel
from edadm_kernels.checks import check_device, check_output_grid
from edadm_kernels.gemm_launch import launch_gemm, variants
from edadm_kernels.hopper import few_rows, matrices, product
from edadm_kernels.launching import arch_of, on_device_of
from edadm_kernels.pointwise import quantize
from edadm_kernels.product_checks import check_codes, check_epilogue, check_output
from edadm_kernels.tiles import choose

__all__ = ["linear", "linear_geglu", "linear_gelu", "variants"]


@torch.library.custom_op("edadm::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _prepare_linear(x, weight, scale, correction, bias, residual, out_dtype)
    if not uses_kernel(x):
        return out.copy_(reference.linear(x, weight, scale, correction, bias, residual, out_dtype))
    if not out.numel():
        return out
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
    """Fill `out` by the kernel that is expected to be the fastest; the arguments are those of `linear`, checked."""
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
    """Fill `out` by a kernel in CUDA C++; false where none takes the operands."""
    if residual is None and few_rows.takes(x, weight, scale, correction, bias):
        few_rows.launch_few_rows(x, weight, scale, correction, bias, out)
        return True
    if residual is None and matrices.takes(x, [weight], (scale, correction), [bias], out.dtype):
        large = matrices.choose_over_single(x.shape[0], (weight.shape[0],), x.shape[1])
        if large is not None:
            matrices.launch_matrices(large, x, [weight], [scale], [correction], [bias], [out])
            return True
    if not product.takes(x, weight, scale, correction, bias, out, residual=residual):
        return False
    shape = product.Shape.matrix(*x.shape)
    fast = product.choose("linear", shape, weight.shape[0])
    product.launch_product(fast, x, weight, scale, correction, bias, out, None, residual, shape)
    return True


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """A linear layer: `y = (sum_k x[m, k] weight[n, k] - correction[n]) * scale[n] + bias[n] + residual[m, n]`.

    The sum is exact (int32); what follows is float32, rounded once to `out_dtype`.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: float32 `[N]`, input scale times weight scale.
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
    return _linear(x, weight, scale, correction, bias, residual, out_dtype)


@torch.library.custom_op("edadm::linear_geglu", mutates_args=())
def _linear_geglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int,
) -> Tensor:
    out = _prepare_geglu(x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)
    if not uses_kernel(x):
        return out.copy_(
            reference.linear_geglu(x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)
        )
    if not out.numel():
        return out
    geglu = (out_scale, out_zero_point, 2**num_bits - 1)
    if uses_hopper(x) and product.takes(x, weight, scale, correction, bias, out):
        shape = product.Shape.matrix(*x.shape)
        fast = product.choose("geglu", shape, weight.shape[0])
        product.launch_product(fast, x, weight, scale, correction, bias, out, None, None, shape, geglu=geglu)
    else:
        packed = weight.dtype == torch.uint8
        tile = choose(arch_of(x), "geglu", x.shape[0], weight.shape[0], x.shape[1], packed=packed)
        with on_device_of(x):
            launch_gemm(tile, x, weight, scale, correction, bias, out, geglu=geglu)
    return out


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
    """The gated half of a feed-forward layer, quantized for the next: `quantize(value * gelu(gate))`.

    Value and gate are columns 2j and 2j + 1 of `linear(...)`, kept in float32; gelu is the exact one (erf).

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[2 F, K]` int8, or `[2 F, K / 2]` uint8, rows interleaved by `pack.pack_geglu`.
        scale: float32 `[2 F]`, interleaved.
        correction: int32 `[2 F]`, interleaved.
        bias: `[2 F]`, floating point, interleaved.
        out_scale: float32, one element.
        out_zero_point: int32, one element, convention of the unsigned code.
        num_bits: 2 to 8.

    Returns:
        Codes `[M, F]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.

    References:
        GEGLU, arXiv 2002.05202; GELU, arXiv 1606.08415.
    """
    return _linear_geglu(x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)


@torch.library.custom_op("edadm::linear_gelu", mutates_args=())
def _linear_gelu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int,
) -> Tensor:
    out = _prepare_gelu(x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)
    arguments = (x, weight, scale, correction, bias)
    if not uses_kernel(x):
        return out.copy_(reference.linear_gelu(*arguments, out_scale, out_zero_point, num_bits))
    if not out.numel():
        return out
    takes = uses_hopper(x) and matrices.takes_codes(out)
    if takes and matrices.takes(x, [weight], (scale, correction), [bias], torch.float16):
        tile = matrices.choose(x.shape[0], (weight.shape[0],), x.shape[1])
        gelu = (out_scale, out_zero_point, 2**num_bits - 1)
        matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], [gelu])
        return out
    y = x.new_empty(out.shape, dtype=torch.float16)
    fill_linear(*arguments, None, y)
    return quantize(torch.nn.functional.gelu(y, approximate="tanh"), out_scale, out_zero_point, num_bits)


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
    """The first half of a feed-forward layer, quantized for the second: `quantize(gelu(linear(...)))`.

    gelu is the approximation by a hyperbolic tangent. Between product and code the kernel of compute capability 9.0
    rounds to float32 alone, others to float16.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[N, K]` int8, or `[N, K / 2]` uint8 from `pack.pack_w4`.
        scale: float32 `[N]`, input scale times weight scale.
        correction: int32 `[N]`, from `pack.linear_correction`.
        bias: `[N]`, floating point.
        out_scale: float32, one element.
        out_zero_point: int32, one element, convention of the unsigned code.
        num_bits: 2 to 8.

    Returns:
        Codes `[M, N]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.

    References:
        GELU, arXiv 1606.08415, section 2.
    """
    return _linear_gelu(x, weight, scale, correction, bias, out_scale, out_zero_point, num_bits)


def _prepare_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Check the arguments and make an empty output."""
    check_device(x, residual)
    check_matrices(x, weight, scale, correction, bias)
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(
            f"a contiguous residual of shape {tuple(out.shape)} is wanted, found {tuple(residual.shape)} with strides "
            f"{residual.stride()}"
        )
    check_output(out_dtype, x, weight, out)
    return out


def _prepare_geglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int,
) -> Tensor:
    """Check the arguments and make an empty output."""
    check_output_grid(num_bits, out_scale, out_zero_point, x)
    check_matrices(x, weight, scale, correction, bias)
    if weight.shape[0] % 2:
        raise ValueError(f"value and gate rows in pairs are wanted, found {weight.shape[0]} rows")
    out = x.new_empty((x.shape[0], weight.shape[0] // 2), dtype=torch.int8)
    check_output(torch.float32, x, weight, out)
    return out


@_linear_gelu.register_fake
def _prepare_gelu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int,
) -> Tensor:
    """Check the arguments and make an empty output."""
    check_output_grid(num_bits, out_scale, out_zero_point, x)
    check_matrices(x, weight, scale, correction, bias)
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.int8)
    check_output(torch.float32, x, weight, out)
    return out


def check_matrices(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> None:
    """Raise unless the operands of a linear layer have the stated types, shapes and layouts."""
    if x.ndim != 2 or weight.ndim != 2 or not x.is_contiguous():
        raise ValueError(
            f"contiguous codes [M, K] and weights [N, K] are wanted, found {tuple(x.shape)} with strides {x.stride()} "
            f"and {tuple(weight.shape)}"
        )
    check_device(x, weight, scale, correction, bias)
    check_codes(x, weight, x.shape[1])
    check_epilogue(scale, correction, bias, weight.shape[0], (weight.shape[0],))


_linear.register_fake(_prepare_linear)


_linear_geglu.register_fake(_prepare_geglu)
