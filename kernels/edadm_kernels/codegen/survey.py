"""Every variant on every architecture, compiled in parallel."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from edadm_kernels.codegen.compilation import MODULES, Binary, compile_variant, list_variants
from edadm_kernels.codegen.disassembly import disassemble
from edadm_kernels.codegen.machine_code import MachineCode, describe

Job = tuple[str, str, int]  # module, variant, architecture
_BATCH = 16  # disassembled at a time


def list_jobs(architectures: Iterable[int], modules: Iterable[str] = MODULES) -> list[Job]:
    """Every variant of `modules` on `architectures`."""
    return [
        (module, variant.name, arch)
        for arch in architectures
        for module in modules
        for variant in list_variants(module, arch)
    ]


def survey(jobs: Sequence[Job], *, processes: int = 2, out: Path | None = None) -> Iterator[MachineCode]:
    """Compile `jobs` and read their machine code, in order.

    Args:
        jobs: From `list_jobs`.
        processes: Compilations at a time; 1 compiles in this process.
        out: Folder for `<module>-<variant>-sm_<arch>.{cubin,ptx,sass}`; None writes nothing. Addresses in a .sass
            count from the first kernel of its batch.
    """
    run: Callable[[Sequence[Job]], list[MachineCode]] = partial(_compile_batch, out=out)
    batches = batch(jobs)
    if processes == 1:
        yield from chain.from_iterable(map(run, batches))
        return
    # a fresh interpreter each: the caller may hold threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from chain.from_iterable(pool.map(run, batches))


def batch(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that are disassembled together, in order: of one architecture each."""
    return [
        list(of_one[start : start + _BATCH])
        for _, group in groupby(jobs, key=lambda job: job[2])
        for of_one in [list(group)]
        for start in range(0, len(of_one), _BATCH)
    ]


def to_row(code: MachineCode) -> dict[str, object]:
    """A plain mapping, as `--json` prints it."""
    return {**asdict(code), "instructions_per_mma": round(code.instructions_per_mma, 2)}


def _compile_batch(jobs: Sequence[Job], out: Path | None) -> list[MachineCode]:
    arch = jobs[0][2]
    found = {(module, v.name): v for module in {job[0] for job in jobs} for v in list_variants(module, arch)}
    variants = [found[module, name] for module, name, _ in jobs]
    binaries = [compile_variant(variant, arch) for variant in variants]
    texts = disassemble([binary.cubin for binary in binaries], arch)
    codes = []
    for (module, name, _), variant, binary, text in zip(jobs, variants, binaries, texts, strict=True):
        if out is not None:
            _write(out / f"{module}-{name}-sm_{arch}", binary, text)
        codes.append(describe(module, variant, arch, binary, text))
    return codes


def _write(stem: Path, binary: Binary, disassembly: str) -> None:
    stem.with_name(stem.name + ".cubin").write_bytes(binary.cubin)
    if binary.ptx:
        stem.with_name(stem.name + ".ptx").write_text(binary.ptx)
    stem.with_name(stem.name + ".sass").write_text(disassembly)
