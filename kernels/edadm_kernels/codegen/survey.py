"""Every variant on every architecture, compiled in parallel."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from edadm_kernels.codegen.compilation import MODULES, compile_variant, list_variants
from edadm_kernels.codegen.machine_code import MachineCode, describe

Job = tuple[str, str, int]  # module, variant, architecture


def list_jobs(architectures: Iterable[int], modules: Iterable[str] = MODULES) -> list[Job]:
    """Every variant of `modules` on `architectures`."""
    return [
        (module, variant.name, arch)
        for arch in architectures
        for module in modules
        for variant in list_variants(module, arch)
    ]


def spread_jobs(architectures: Sequence[int], modules: Iterable[str] = MODULES) -> list[Job]:
    """Every kernel on every architecture, its variants taken in turn: a fraction of `list_jobs` for everyday tests."""
    jobs = []
    for turn, arch in enumerate(architectures):
        for module in modules:
            by_kernel: dict[str, list[str]] = {}
            for variant in list_variants(module, arch):
                by_kernel.setdefault(variant.kernel, []).append(variant.name)
            for names in by_kernel.values():
                # one more than the architectures: names often come in fours, and each should meet each architecture
                taken = names[turn :: len(architectures) + 1] or names[:1]
                jobs += [(module, name, arch) for name in taken]
    return jobs


def survey(jobs: list[Job], *, processes: int = 2, out: Path | None = None) -> Iterator[MachineCode]:
    """Compile `jobs` and read their machine code, in order.

    Args:
        jobs: From `list_jobs`.
        processes: Compilations at a time.
        out: Folder for `<module>-<variant>-sm_<arch>.{cubin,ptx,sass}`; None writes nothing.
    """
    run: Callable[[Job], MachineCode] = partial(_compile_job, out=out)
    if processes == 1:
        yield from map(run, jobs)
        return
    # a fresh interpreter each: the caller may hold threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(run, jobs)


def to_row(code: MachineCode) -> dict[str, object]:
    """A plain mapping, as `--json` prints it."""
    return {**asdict(code), "instructions_per_mma": round(code.instructions_per_mma, 2)}


def _compile_job(job: Job, out: Path | None) -> MachineCode:
    module, name, arch = job
    variant = next(variant for variant in list_variants(module, arch) if variant.name == name)
    binary = compile_variant(variant, arch)
    if out is not None:
        stem = out / f"{module}-{name}-sm_{arch}"
        stem.with_name(stem.name + ".cubin").write_bytes(binary.cubin)
        if binary.ptx:
            stem.with_name(stem.name + ".ptx").write_text(binary.ptx)
        stem.with_name(stem.name + ".sass").write_text(binary.disassembly)
    return describe(module, variant, arch, binary)
