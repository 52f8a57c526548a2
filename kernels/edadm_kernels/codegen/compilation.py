"""From a kernel variant to a binary and its disassembly, through Triton's own cache."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from edadm_kernels.backend import INTERPRETED
from edadm_kernels.hopper import Variant
from edadm_kernels.hopper.compilation import compiled
from edadm_kernels.variants import KernelVariant

ARCHITECTURES = (80, 86, 89, 90)
MODULES = ("attention", "conv", "gemm", "hopper", "norm", "pointwise")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Binary:
    """A compiled variant.

    Args:
        cubin: The binary.
        disassembly: What nvdisasm prints for it.
        ptx: The code it was assembled from; empty for a kernel in CUDA C++.
        has_dot: Whether the kernel multiplies matrices.
        registers: Registers a thread.
        shared_bytes: Shared memory a program.
    """

    cubin: bytes
    disassembly: str
    ptx: str
    has_dot: bool
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class SourceVariant:
    """A kernel in CUDA C++, described as `KernelVariant` describes one in Triton.

    Args:
        variant: The kernel with its compile-time parameters.
    """

    variant: Variant

    @property
    def name(self) -> str:
        """Unique in the package."""
        return self.variant.label()

    @property
    def kernel(self) -> str:
        """Name of the function."""
        return self.variant.name

    @property
    def num_warps(self) -> int:
        """Warps a block."""
        return self.variant.threads // 32

    @property
    def num_stages(self) -> int:
        """Steps whose operands are on their way."""
        return self.variant.defines().get("STAGES", 1)

    @property
    def tile_rows(self) -> int:
        """Rows of the tile of a product; else 0."""
        return self.variant.defines().get("BM", 0)


AnyVariant = KernelVariant | SourceVariant


def list_variants(module: str, arch: int) -> list[AnyVariant]:
    """The variants that one of `MODULES` launches on `arch` (such as 90)."""
    found = importlib.import_module(f"edadm_kernels.{module}").variants(arch)
    return [variant if isinstance(variant, KernelVariant) else SourceVariant(variant) for variant in found]


def compile_variant(variant: AnyVariant, arch: int) -> Binary:
    """Compile for `sm_<arch>`; no GPU is needed.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler.
    """
    if isinstance(variant, SourceVariant):
        own = variant.variant
        cubin = compiled(own.source, own.defines(), own.prelude())
        return _binary(variant.name, cubin, "", variant.tile_rows > 0, own.shared_bytes)
    if INTERPRETED:
        raise RuntimeError("compiled kernels are wanted, but TRITON_INTERPRET=1 is set; unset it")
    source = ASTSource(variant.fn, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    has_dot = "tt.dot" in kernel.asm["ttir"]
    return _binary(variant.name, kernel.asm["cubin"], kernel.asm["ptx"], has_dot, kernel.metadata.shared)


def _binary(name: str, cubin: bytes, ptx: str, has_dot: bool, shared_bytes: int) -> Binary:
    disassembly, resources = _disassemble(cubin)
    found = _RESOURCES.search(resources)
    if found is None:
        raise RuntimeError(f"the resources of {name} are wanted from cuobjdump, found {resources!r}")
    return Binary(
        cubin=cubin,
        disassembly=disassembly,
        ptx=ptx,
        has_dot=has_dot,
        registers=int(found.group(1)),
        shared_bytes=shared_bytes,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Output of `nvdisasm -c` and `cuobjdump -res-usage`, kept in Triton's cache."""
    cache = get_cache_manager(hashlib.sha256(b"edadm-disassembly" + cubin).hexdigest())
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        for name, tool, flag in (
            ("kernel.sass", triton.knobs.nvidia.nvdisasm.path, "-c"),
            ("kernel.resources", triton.knobs.nvidia.cuobjdump.path, "-res-usage"),
        ):
            kept = cache.get_file(name)
            if kept is None:
                text = subprocess.run([tool, flag, str(path)], check=True, capture_output=True, text=True).stdout
                cache.put(text, name, binary=False)
            else:
                text = Path(kept).read_text()
            texts.append(text)
    return texts[0], texts[1]
