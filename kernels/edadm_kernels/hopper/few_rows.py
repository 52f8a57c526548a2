"""Products of at most eight rows, one or several side by side; the launch of `few_rows.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_kernels.hopper.driver import launch

MOST_ROWS = 8
_ROWS = (1, 2, 4, 8)  # compiled for
_WARPS, _EACH = 8, 4
_ALIGNMENT = 16  # bytes of an address and of a row of codes
_MOST_SHARED = 200 * 1024  # bytes of codes that a block keeps


@dataclass(frozen=True)
class FewRows:
    """Compile-time parameters of `few_rows.cu`.

    Args:
        most_rows: Rows of the left operand, at most.
        dtype: The element type of the output: `float16`, `bfloat16` or `float32`.
        shared_bytes: Room for the codes of the left operand.
    """

    most_rows: int
    dtype: str = "float16"
    shared_bytes: int = 48 * 1024

    source = "few_rows.cu"
    name = "few_rows"
    threads = _WARPS * 32
    cluster = 1

    def defines(self) -> dict[str, int]:
        """Macros of the source."""
        floats, bfloats = self.dtype == "float32", self.dtype == "bfloat16"
        return {
            "ROWS": self.most_rows,
            "WARPS": _WARPS,
            "EACH": _EACH,
            "FLOATS": int(floats),
            "BFLOATS": int(bfloats),
        }

    def prelude(self) -> str:
        """Nothing."""
        return ""

    def label(self) -> str:
        """For tables."""
        return f"few-rows-{self.most_rows}-{self.dtype}"


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "correction", "bias", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "products")),
    )


def variants() -> list[FewRows]:
    """Every number of rows and element type."""
    return [FewRows(rows, dtype) for rows in _ROWS for dtype in ("float16", "bfloat16", "float32")]


def takes(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> bool:
    """Whether `launch_few_rows` serves operands `[..., M, K]` and `[..., N, K]` with these types and sizes."""
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
    """Fill `out` `[S, M, N]` with the products of `x` `[S, M, K]` and `weight` `[S, N, K]`; S may be missing.

    Args:
        x: Codes, int8, contiguous, as everything here.
        weight: Codes, int8.
        scale: float32 `[S, N]`.
        correction: int32 `[S, N]`.
        bias: float32 `[S, N]`.
        out: float16, bfloat16 or float32.
    """
    rows, products = x.shape[-2:]
    outputs = weight.shape[-2]
    stacks = weight.numel() // (outputs * products)
    room = 48 * 1024 if rows * products <= 48 * 1024 else _MOST_SHARED
    variant = FewRows(next(n for n in _ROWS if n >= rows), str(out.dtype).removeprefix("torch."), room)
    pointers = (x, weight, scale, correction, bias, out)
    problem = _Problem(*(None if t is None else t.data_ptr() for t in pointers), rows, outputs, products)
    launch(variant, stacks * -(-outputs // (_WARPS * _EACH)), [problem], x.device.index or 0)
