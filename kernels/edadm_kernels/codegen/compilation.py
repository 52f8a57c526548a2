"""Compiles a kernel variant to a binary; Triton's cache and that of the kernels in CUDA C++ are used."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edadm_kernels.backend import INTERPRETED
from edadm_kernels.codegen.disassembly import machine_code
from edadm_kernels.hopper import Variant
from edadm_kernels.hopper.compilation import compiled
from edadm_kernels.variants import KernelVariant

_LOCATION = re.compile(r"\s*(\.loc|\.file|//)|\$L__(tmp|func)")
_DEBUG_SECTIONS = re.compile(r"^\s*\.section\s+\.debug.*", re.MULTILINE | re.DOTALL)

ARCHITECTURES = (80, 86, 89, 90)
MODULES = ("attention", "attention_int8", "conv", "gemm", "heads", "hopper", "norm", "pointwise")


@dataclass(frozen=True)
class Binary:
    """A compiled variant.

    Args:
        cubin: The binary.
        ptx: The code that it was assembled from; empty for a kernel in CUDA C++.
        has_dot: Whether the kernel multiplies matrices.
        shared_bytes: Bytes of shared memory per program.
    """

    cubin: bytes
    ptx: str
    has_dot: bool
    shared_bytes: int

    @property
    def program(self) -> bytes:
        """Returns what the kernel computes, which does not change with lines and names of helpers in the source.

        This is the PTX without debug labels and source locations, or the instructions of a kernel in CUDA C++. The
        instructions of a Triton kernel are not compared, because the assembler may number registers in another order
        where only debug labels differ.
        """
        if not self.ptx:
            return machine_code(self.cubin)
        lines = _DEBUG_SECTIONS.sub("", self.ptx).splitlines()
        return "\n".join(line for line in lines if not _LOCATION.match(line)).encode()


@dataclass(frozen=True)
class SourceVariant:
    """A kernel in CUDA C++, described as `KernelVariant` describes one in Triton.

    Args:
        variant: The kernel with its compile-time parameters.
    """

    variant: Variant

    @property
    def name(self) -> str:
        """Returns the name of the variant, which is unique in the package."""
        return self.variant.label()

    @property
    def kernel(self) -> str:
        """Returns the name of the function."""
        return self.variant.name

    @property
    def num_warps(self) -> int:
        """Returns the warps per block."""
        return self.variant.threads // 32

    @property
    def num_stages(self) -> int:
        """Returns the number of steps whose operands are copied ahead."""
        return self.variant.defines().get("STAGES", 1)

    @property
    def tile_rows(self) -> int:
        """Returns the rows of the tile of a product; 0 for other kernels."""
        return self.variant.defines().get("BM", 0)


AnyVariant = KernelVariant | SourceVariant


def list_variants(module: str, arch: int) -> list[AnyVariant]:
    """Returns the variants that one of `MODULES` launches on `arch` (such as 90)."""
    variants = importlib.import_module(f"edadm_kernels.{module}").variants(arch)
    return [variant if isinstance(variant, KernelVariant) else SourceVariant(variant) for variant in variants]


def compile_variant(variant: AnyVariant, arch: int) -> Binary:
    """Compiles a variant for `sm_<arch>`; no GPU is needed.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler.
    """
    if isinstance(variant, SourceVariant):
        source_variant = variant.variant
        cubin = compiled(source_variant.source, source_variant.defines(), source_variant.prelude())
        return Binary(cubin, ptx="", has_dot=variant.tile_rows > 0, shared_bytes=source_variant.shared_bytes)
    if INTERPRETED:
        raise RuntimeError("a compiler is expected, found the interpreter; unset TRITON_INTERPRET")
    source = ASTSource(variant.fn, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    has_dot = "tt.dot" in kernel.asm["ttir"]
    return Binary(kernel.asm["cubin"], kernel.asm["ptx"], has_dot, kernel.metadata.shared)
