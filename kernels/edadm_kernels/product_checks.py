"""Checks of arguments that the products share; each error is one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_kernels.checks import check_size
from edadm_kernels.pack import w4_block

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_TERMS = 65_792  # 255 * 128 * MAX_TERMS fits an int32


def check_codes(x: Tensor, weight: Tensor, channels: int) -> int:
    """Returns the terms per sum; raises an error unless the codes fit together and their sums fit an int32."""
    if x.dtype != torch.int8 or weight.dtype not in (torch.int8, torch.uint8):
        raise TypeError(
            f"int8 activations with int8 or packed uint8 weights are expected, found {x.dtype} and {weight.dtype}"
        )
    if not weight.numel():
        raise ValueError(f"weights with elements are expected, found shape {tuple(weight.shape)}")
    packed = weight.dtype == torch.uint8
    if weight.shape[-1] * (2 if packed else 1) != channels or (packed and w4_block(channels) is None):
        raise ValueError(
            f"weights of {channels} input channels are expected, found {tuple(weight.shape)} {weight.dtype}; "
            "pack four-bit codes with edadm_kernels.pack.pack_w4"
        )
    if not weight.is_contiguous():
        raise ValueError("contiguous weights are expected; call .contiguous() on them first")
    terms = weight.shape[1:].numel() * (2 if packed else 1)
    if terms > MAX_TERMS:
        raise ValueError(f"sums of at most {MAX_TERMS} products are expected, which fit an int32, found {terms}")
    return terms


def check_epilogue(
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    correction_shape: tuple[int, ...] | None = None,
) -> None:
    """Raises an error unless the vectors per channel have these shapes and the types of an epilogue.

    Args:
        scale: float32.
        correction: int32.
        bias: Floating point, or `None`.
        shape: The shape of scale and bias: `[N]` for N output channels.
        correction_shape: The shape of the correction; `None` means `shape`.
    """
    if scale.dtype != torch.float32 or correction.dtype != torch.int32:
        raise TypeError(
            f"a float32 scale and an int32 correction are expected, found {scale.dtype} and {correction.dtype}"
        )
    check_addends(bias)
    if scale.shape != shape or (bias is not None and bias.shape != shape):
        raise ValueError(
            f"scale and bias of shape {shape} are expected, found {tuple(scale.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    correction_shape = shape if correction_shape is None else correction_shape
    if correction.shape != correction_shape:
        raise ValueError(f"a correction of shape {correction_shape} is expected, found {tuple(correction.shape)}")
    contiguous = scale.is_contiguous() and correction.is_contiguous() and (bias is None or bias.is_contiguous())
    if not contiguous:
        raise ValueError("contiguous scale, correction and bias are expected; call .contiguous() on them first")


def check_addends(*addends: Tensor | None) -> None:
    """Raises a TypeError unless what is added to a product is floating point; `None` stands for nothing."""
    for addend in addends:
        if addend is not None and addend.dtype not in FLOATS:
            raise TypeError(f"float16, bfloat16 or float32 biases and residuals are expected, found {addend.dtype}")


def side_by_side(x: Tensor, more: Tensor) -> Tensor:
    """Returns an empty tensor for codes `[M, K]` beside codes `[M, L]`; raises an error unless they fit together."""
    if x.ndim != 2 or more.ndim != 2 or len(x) != len(more) or not (x.is_contiguous() and more.is_contiguous()):
        raise ValueError(
            f"contiguous codes [M, K] and [M, L] are expected, found {tuple(x.shape)} with strides {x.stride()} and "
            f"{tuple(more.shape)} with strides {more.stride()}"
        )
    if more.dtype != torch.int8:
        raise TypeError(f"int8 codes are expected, found {more.dtype}")
    return x.new_empty((len(x), x.shape[1] + more.shape[1]))


def on_meta(x: Tensor) -> Tensor:
    """Returns a tensor of the same shape, strides and type on the meta device, where every address is aligned."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def check_output(out_dtype: torch.dtype, *tensors: Tensor) -> None:
    """Raises an error unless the output is floating point and every offset fits an int32."""
    if out_dtype not in FLOATS:
        raise TypeError(f"a float16, bfloat16 or float32 output is expected, found {out_dtype}")
    check_size(*tensors)
