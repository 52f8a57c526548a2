"""Compiles every variant for every architecture, in parallel."""

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
_BATCH = 16  # binaries that are disassembled together


def list_jobs(architectures: Iterable[int], modules: Iterable[str] = MODULES) -> list[Job]:
    """Lists every variant of `modules` on `architectures`."""
    return [
        (module, variant.name, arch)
        for arch in architectures
        for module in modules
        for variant in list_variants(module, arch)
    ]


def survey(jobs: Sequence[Job], *, processes: int = 2, out: Path | None = None) -> Iterator[MachineCode]:
    """Compiles `jobs` and yields their machine code, in order.

    Args:
        jobs: What `list_jobs` returns.
        processes: Number of compilations at a time; with 1 this process compiles.
        out: Folder for `<module>-<variant>-sm_<arch>.{cubin,ptx,sass}`; with `None` nothing is written. Addresses in a
            .sass file count from the first kernel of its batch.
    """
    run: Callable[[Sequence[Job]], list[MachineCode]] = partial(_compile_batch, out=out)
    batches = batch(jobs)
    if processes == 1:
        yield from chain.from_iterable(map(run, batches))
        return
    # each process is a fresh interpreter, because the caller may have threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from chain.from_iterable(pool.map(run, batches))


def batch(jobs: Sequence[Job]) -> list[list[Job]]:
    """Returns the jobs in batches that are disassembled together, each of one architecture, in order."""
    return [
        list(of_one[start : start + _BATCH])
        for _, group in groupby(jobs, key=lambda job: job[2])
        for of_one in [list(group)]
        for start in range(0, len(of_one), _BATCH)
    ]


def to_row(code: MachineCode) -> dict[str, object]:
    """Returns a plain mapping, which `--json` prints."""
    return {**asdict(code), "instructions_per_mma": round(code.instructions_per_mma, 2)}


def _compile_batch(jobs: Sequence[Job], out: Path | None) -> list[MachineCode]:
    """Compiles and disassembles jobs of one architecture."""
    arch = jobs[0][2]
    listed = {(module, v.name): v for module in {job[0] for job in jobs} for v in list_variants(module, arch)}
    variants = [listed[module, name] for module, name, _ in jobs]
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
