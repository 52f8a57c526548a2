"""Checks of arguments that all operations share; each error is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_QUANTIZERS = 3  # the query, key and value layers of one input
MAX_ELEMENTS = 2**31 - 2**16  # offsets in the kernels are int32, and a program's block may extend past the last element


def check_floating(x: Tensor) -> None:
    """Raises a TypeError unless `x` is float16, bfloat16 or float32."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"a float16, bfloat16 or float32 input is expected, found {x.dtype}; convert it with .to()")


def check_device(x: Tensor, *others: Tensor | None) -> None:
    """Raises a ValueError unless all tensors are on the device of `x`: a kernel receives only addresses."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"tensors on one device are expected, found {x.device} and {other.device}")


def check_bits(num_bits: int) -> None:
    """Raises a ValueError unless codes of `num_bits` bits fit an int8."""
    if not 2 <= num_bits <= 8:
        raise ValueError(f"2 to 8 bits are expected, found {num_bits}")


def check_output_grid(num_bits: int, scale: Tensor, zero_point: Tensor, *inputs: Tensor) -> None:
    """Raises an error unless an output has 2 to 8 bits and one scale and zero-point on the device of the inputs."""
    check_bits(num_bits)
    check_quantizers(scale, zero_point, count=1)
    check_device(*inputs, scale, zero_point)


def check_quantizers(scales: Tensor, zero_points: Tensor, count: int | None = None) -> None:
    """Raises an error unless float32 `scales` and int32 `zero_points` have `count` elements each (`None`: 1 to 3)."""
    if scales.dtype != torch.float32 or zero_points.dtype != torch.int32:
        raise TypeError(
            f"float32 scales and int32 zero-points are expected, found {scales.dtype} and {zero_points.dtype}; "
            "convert them with .to()"
        )
    sizes = (scales.numel(), zero_points.numel())
    if count is not None and sizes != (count, count):
        raise ValueError(f"{count} scale and {count} zero-point are expected, found {sizes[0]} and {sizes[1]}")
    if not (scales.is_contiguous() and zero_points.is_contiguous()):
        raise ValueError("contiguous scales and zero-points are expected; call .contiguous() on them first")
    if sizes[0] != sizes[1] or not 1 <= sizes[0] <= MAX_QUANTIZERS:
        raise ValueError(f"1 to {MAX_QUANTIZERS} scales and as many zero-points are expected, found {sizes}")


def check_numbers(*numbers: Tensor) -> None:
    """Raises an error unless every tensor is one float32 number: a kernel reads the first four bytes of each."""
    for number in numbers:
        if number.dtype != torch.float32:
            raise TypeError(f"a float32 number is expected, found {number.dtype}; convert it with .to()")
        if number.numel() != 1:
            raise ValueError(f"a tensor with one number is expected, found {number.numel()}")


def check_rows(x: Tensor) -> None:
    """Raises a ValueError unless the rows of `x` `[N, T, C]` are contiguous and evenly spaced across all samples."""
    has_neighbours = x.ndim == 3 and x.shape[0] > 1 and x.shape[1] > 0
    if x.ndim != 3 or x.stride(2) != 1 or (has_neighbours and x.stride(0) != x.shape[1] * x.stride(1)):
        raise ValueError(
            f"evenly spaced rows [N, T, C] are expected, found shape {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous() first"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises a ValueError unless the operands of an attention are `[N, heads, tokens, d]` with at least one key."""
    alike = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
    if not alike or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] < 1:
        raise ValueError(
            "queries [N, heads, T, d], keys and values [N, heads, S, d] with at least one key are expected, found "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def check_affine(weight: Tensor, bias: Tensor, channels: int) -> None:
    """Raises a ValueError unless `weight` and `bias` are contiguous and have one element per channel."""
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias of shape ({channels},) are expected, found {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not (weight.is_contiguous() and bias.is_contiguous()):
        raise ValueError("contiguous weight and bias are expected; call .contiguous() on them first")


def check_size(*tensors: Tensor) -> None:
    """Raises a ValueError unless every offset fits an int32."""
    largest = max(tensor.numel() for tensor in tensors)
    if largest > MAX_ELEMENTS:
        raise ValueError(f"tensors of at most {MAX_ELEMENTS} elements are expected, found {largest}; split the batch")
