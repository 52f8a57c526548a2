"""Decides which products of at most eight rows `few_rows.cu` computes, and launches it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_kernels.hopper.driver import launch

MOST_ROWS = 8
_ROWS = (1, 2, 4, 8)  # numbers of rows that the kernel is compiled for
_WARPS, _EACH = 8, 4  # warps per block, outputs per warp
_ALIGNMENT = 16  # bytes of an address and of a row of codes
_FEW_BYTES, _MOST_SHARED = 48 * 1024, 200 * 1024  # bytes of shared memory for codes: small blocks, the largest ones


@dataclass(frozen=True)
class FewRows:
    """Compile-time parameters of `few_rows.cu`.

    Args:
        most_rows: The largest number of rows of the left operand.
        dtype: The element type of the output: `float16`, `bfloat16` or `float32`.
        shared_bytes: Bytes of shared memory for the codes of the left operand.
    """

    most_rows: int
    dtype: str = "float16"
    shared_bytes: int = _FEW_BYTES

    source = "few_rows.cu"
    name = "few_rows"
    threads = _WARPS * 32
    cluster = 1

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        floats, bfloats = self.dtype == "float32", self.dtype == "bfloat16"
        return {
            "ROWS": self.most_rows,
            "WARPS": _WARPS,
            "EACH": _EACH,
            "FLOATS": int(floats),
            "BFLOATS": int(bfloats),
        }

    def prelude(self) -> str:
        """Returns the text before the source, which is empty."""
        return ""

    def label(self) -> str:
        """Returns the name of the variant for tables."""
        return f"few-rows-{self.most_rows}-{self.dtype}"


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "correction", "bias", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "products")),
    )


def variants() -> list[FewRows]:
    """Lists every number of rows with every element type."""
    return [FewRows(rows, dtype) for rows in _ROWS for dtype in ("float16", "bfloat16", "float32")]


def takes(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `launch_few_rows` supports operands `[..., M, K]` and `[..., N, K]` of these types and sizes."""
    read = (x, weight, scale, correction, bias)
    return (
        weight.dtype == torch.int8
        and 0 < x.shape[-2] <= MOST_ROWS
        and x.shape[-1] % _ALIGNMENT == 0
        and x.shape[-2] * x.shape[-1] <= _MOST_SHARED
        and (bias is None or bias.dtype == torch.float32)
        and all(t is None or t.data_ptr() % _ALIGNMENT == 0 for t in read)
    )


def launch_few_rows(
    x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Fills `out` `[S, M, N]` with the products of `x` `[S, M, K]` and `weight` `[S, N, K]`; S may be missing.

    All tensors are contiguous.

    Args:
        x: Codes, int8.
        weight: Codes, int8.
        scale: float32 `[S, N]`.
        correction: int32 `[S, N]`.
        bias: float32 `[S, N]`.
        out: float16, bfloat16 or float32.
    """
    rows, products = x.shape[-2:]
    outputs = weight.shape[-2]
    stacks = weight.numel() // (outputs * products)
    shared_bytes = _FEW_BYTES if rows * products <= _FEW_BYTES else _MOST_SHARED
    variant = FewRows(next(n for n in _ROWS if n >= rows), str(out.dtype).removeprefix("torch."), shared_bytes)
    pointers = (x, weight, scale, correction, bias, out)
    problem = _Problem(*(None if t is None else t.data_ptr() for t in pointers), rows, outputs, products)
    launch(variant, stacks * -(-outputs // (_WARPS * _EACH)), [problem], x.device.index or 0)
