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
from edadm_kernels.variants import KernelVariant

ARCHITECTURES = (80, 86, 89, 90)
MODULES = ("attention", "conv", "gemm", "norm", "pointwise")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Binary:
    """A compiled variant.

    Args:
        cubin: The binary.
        disassembly: What nvdisasm prints for it.
        ptx: The code it was assembled from.
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


def list_variants(module: str, arch: int) -> list[KernelVariant]:
    """The variants that one of `MODULES` launches on `arch` (such as 90)."""
    found: list[KernelVariant] = importlib.import_module(f"edadm_kernels.{module}").variants(arch)
    return found


def compile_variant(variant: KernelVariant, arch: int) -> Binary:
    """Compile for `sm_<arch>`; no GPU is needed.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler.
    """
    if INTERPRETED:
        raise RuntimeError("compiled kernels are wanted, but TRITON_INTERPRET=1 is set; unset it")
    source = ASTSource(variant.fn, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin: bytes = kernel.asm["cubin"]
    disassembly, resources = _disassemble(cubin)
    found = _RESOURCES.search(resources)
    if found is None:
        raise RuntimeError(f"the resources of {variant.name} are wanted from cuobjdump, found {resources!r}")
    return Binary(
        cubin=cubin,
        disassembly=disassembly,
        ptx=kernel.asm["ptx"],
        has_dot="tt.dot" in kernel.asm["ttir"],
        registers=int(found.group(1)),
        shared_bytes=kernel.metadata.shared,
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
