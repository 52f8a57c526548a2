"""Describes one compilation of one kernel, so that a machine without a GPU can compile it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from edadm_kernels.launching import overlap


@dataclass(frozen=True)
class KernelVariant:
    """What the launcher compiles for some shapes.

    Every kernel module has `variants(arch) -> list[KernelVariant]`, which reads the same tables as the launches, so
    that the code-generation gate sees the code that runs.

    Args:
        name: A name that is unique in the package, such as `gemm-128x128x64`.
        fn: The `triton.jit` function.
        signature: Triton type of every argument, in order, such as `{"x": "*i8", "rows": "i32", "BLOCK": "constexpr"}`.
        constexprs: Value of every compile-time argument.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
        attrs: Attributes of arguments by index path, such as `{(0,): [["tt.divisibility", 16]]}`.
        options: Further compile options, such as `{"enable_fp_fusion": False}`.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    attrs: Mapping[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """Returns the name of the function."""
        return str(self.fn.__name__)

    @property
    def tile_rows(self) -> int:
        """Returns the rows of the tile of a product, which the variant calls `BM`; 0 for other kernels."""
        return int(self.constexprs.get("BM", 0))


def aligned(
    arch: int,
    name: str,
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    unaligned: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 1,
    options: Mapping[str, Any] | None = None,
) -> KernelVariant:
    """Returns a variant whose pointers and integers are multiples of 16, as they are for the shapes of a denoiser.

    Args:
        arch: Compute capability, such as 90.
        name: As in `KernelVariant`.
        fn: As in `KernelVariant`.
        signature: Types of the run-time arguments; the compile-time ones are added from `constexprs`.
        constexprs: As in `KernelVariant`.
        unaligned: Run-time arguments that are not multiples of 16.
        num_warps: As in `KernelVariant`.
        num_stages: As in `KernelVariant`.
        options: As in `KernelVariant`.
    """
    types = {argument: signature.get(argument, "constexpr") for argument in fn.arg_names}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, kind) in enumerate(types.items())
        if argument not in unaligned and (kind.startswith("*") or kind in ("i32", "i64"))
    }
    shared = overlap(arch)
    constants = {**constexprs, "OVERLAP": shared.pop("OVERLAP")}
    return KernelVariant(name, fn, types, constants, num_warps, num_stages, attrs, {**(options or {}), **shared})
