"""The code-generation gate: what it reads, what it rejects, and that the kernels pass it on every architecture."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import edadm_kernels
from edadm_kernels import hopper
from edadm_kernels.codegen import (
    ARCHITECTURES,
    MODULES,
    MachineCode,
    batch,
    compile_variant,
    disassemble,
    list_jobs,
    list_variants,
    parse,
    survey,
    violations,
)
from edadm_kernels.codegen import __main__ as command
from edadm_kernels.codegen.compilation import Binary
from edadm_kernels.codegen.listing import count
from edadm_kernels.codegen.survey import Job

INTERPRETED = False

DISASSEMBLY = """
        /*1000*/                   LDC R1, c[0x0][0x28] ;
        /*1010*/                   LDG.E.128 R4, desc[UR4][R8.64] ;
        /*1020*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64] ;
        /*1030*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*1040*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*1050*/               @P1 BRA 0x1020 ;
        /*1060*/                   PRMT R4, R5, 0x3340, R6 ;
        /*1070*/               @P2 BRA 0x1010 ;
        /*1080*/              @!P3 BRA 0x10c0 ;
        /*1090*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*10a0*/               @P1 BRA 0x1090 ;
        /*10b0*/                   EXIT ;
        /*10c0*/                   BRA 0x10c0;
        /*10d0*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*10e0*/                   BRA 0x1010 ;
"""


def test_the_main_loop_is_the_innermost_with_most_products() -> None:
    listing = parse(DISASSEMBLY)
    assert [instruction.opcode for instruction in listing.main_loop()] == [
        "LDGSTS.E.BYPASS.128",
        "IMMA.16832.S8.S8",
        "IMMA.16832.S8.S8",
        "BRA",
    ]
    assert len(listing.loops()) == 3
    assert count(listing.instructions, "LDG") == 1


def test_code_without_a_loop_has_no_main_loop() -> None:
    assert parse("        /*0000*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;").main_loop() == ()


def test_a_branch_out_of_the_listing_is_refused() -> None:
    with pytest.raises(ValueError, match="after BRA, found ' 0x2000 '"):
        parse("        /*1000*/                   BRA 0x2000 ;")


# The kernels in CUDA C++ are for one architecture.
SURVEYED = {(module, arch) for module, arch in itertools.product(MODULES, ARCHITECTURES) if module != "hopper"}
SURVEYED |= {("hopper", hopper.ARCHITECTURE)} if hopper.is_available() else set()

PRODUCT = MachineCode(
    module="gemm",
    name="made-up",
    arch=90,
    num_warps=4,
    num_stages=3,
    registers=168,
    shared_bytes=98304,
    has_dot=True,
    tile_rows=128,
    mma="IGMMA",
    loop_mma=4,
    float_mma=0,
    float_warp_groups=0,
    loop_instructions=100,
    loop_prmt=0,
    loop_spills=0,
    loop_copies=8,
    loop_narrow_copies=0,
    spills=0,
    loads=2,
    wide_loads=0,
    sha256="0" * 64,
)
ATTENTION = dataclasses.replace(PRODUCT, mma="", loop_mma=0, float_mma=40, float_warp_groups=40)
STREAM = dataclasses.replace(PRODUCT, has_dot=False, mma="", loop_mma=0, tile_rows=0, wide_loads=2)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (dataclasses.replace(PRODUCT, loop_mma=0), "no loop has an integer matrix instruction"),
        (dataclasses.replace(PRODUCT, mma="IMMA"), "IMMA where a tile of 128 rows"),
        (dataclasses.replace(PRODUCT, loop_spills=286), "286 LDL/STL"),
        (dataclasses.replace(PRODUCT, loop_prmt=265), "265 PRMT"),
        (dataclasses.replace(PRODUCT, loop_copies=0), "no asynchronous copy"),
        (dataclasses.replace(PRODUCT, loop_narrow_copies=4), "4 of 8 copies"),
        (
            dataclasses.replace(PRODUCT, shared_bytes=240_000),
            "240000 bytes of shared memory where",
        ),
        (dataclasses.replace(STREAM, spills=2), "2 LDL/STL"),
        (dataclasses.replace(ATTENTION, spills=37), "37 LDL/STL"),
        (
            dataclasses.replace(ATTENTION, module="hopper", float_warp_groups=8),
            "32 matrix instructions that are not HGMMA",
        ),
        (dataclasses.replace(STREAM, wide_loads=0), "none of 2 loads"),
    ],
)
def test_rejections(code: MachineCode, reason: str) -> None:
    assert [actual for actual in violations(code) if actual.startswith(reason)]


def test_sound_code_passes() -> None:
    assert violations(PRODUCT) == []
    assert violations(STREAM) == []
    assert violations(ATTENTION) == []
    assert violations(dataclasses.replace(ATTENTION, float_warp_groups=0)) == [], "Triton's may have small tiles"
    assert violations(dataclasses.replace(ATTENTION, module="hopper")) == []
    assert violations(dataclasses.replace(PRODUCT, mma="IMMA", tile_rows=32)) == []


def test_every_module_with_variants_is_surveyed() -> None:
    modules = [
        importlib.import_module(f"edadm_kernels.{module.name}")
        for module in pkgutil.iter_modules(edadm_kernels.__path__)
        if module.name not in ("variants", "codegen")
    ]
    surveyed = {importlib.import_module(f"edadm_kernels.{name}").variants for name in MODULES}
    assert {module.variants for module in modules if hasattr(module, "variants")} == surveyed


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_variant_names_are_unique(module: str, arch: int) -> None:
    names = [variant.name for variant in list_variants(module, arch)]
    assert bool(names) == ((module, arch) in SURVEYED)
    assert len(names) == len(set(names))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process whose Triton compiles: here it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(
        [*map(str, {Path(p).parent for p in edadm_kernels.__path__}), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": path},
    )


def run_codegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("-m", "edadm_kernels.codegen", *arguments)


# Whether a tile of weights read as [BK, BN] makes int8 loops spill and shuffle on sm_8x.
PREFETCH_DEFECT = {"3.6": False, "3.7": False, "3.8": True, "3.9": True}


def test_the_gate_finds_what_the_products_avoid() -> None:
    finished = run_script(str(Path(__file__).with_name("plain_product.py")))
    assert finished.returncode == 0, finished.stderr
    verdict = json.loads(finished.stdout)
    assert verdict["rows"] == []
    version = ".".join(verdict["triton"].split(".")[:2])
    if version not in PREFETCH_DEFECT:
        pytest.skip(f"what Triton {version} makes of this loop has not been tried")
    assert any("PRMT" in reason for reason in verdict["columns"]) == PREFETCH_DEFECT[version]


def test_only_keeps_what_matches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["codegen", "--only", "norm/nothing-*"])
    assert command.main() == 2
    assert "norm/nothing-*" in capsys.readouterr().err


def test_what_is_rejected_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["codegen", "--arch", "80", "--only", "pointwise/quantize-*", "--processes", "1"])
    monkeypatch.setattr(command, "violations", lambda code: ["made up"] if code.name == "quantize-fp16" else [])
    assert command.main() == 1
    assert capsys.readouterr().err == "pointwise/quantize-fp16 on sm_80: made up\n"


def test_lines_of_the_source_are_not_part_of_the_program() -> None:
    ptx = "\t.loc\t1 {} 4\n$L__tmp1:\n\tadd.s32 %r1, %r2, {};\n\t.section\t.debug_str\n\t.b8 {}\n"
    program = Binary(b"", ptx.format(7, 1, 99), False, 0).program
    assert program == Binary(b"", ptx.format(9, 1, 0), False, 0).program
    assert program != Binary(b"", ptx.format(7, 2, 99), False, 0).program


def test_a_changed_kernel_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["codegen", "--arch", "80", "--only", "pointwise/quantize-fp16", "--processes", "1"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [*words, *more])
        return command.main(), capsys.readouterr().err

    assert run("--out", str(tmp_path)) == (0, "")
    assert run("--compare", str(tmp_path)) == (0, "")
    report = tmp_path / "codegen.json"
    report.write_text(report.read_text().replace('"sha256": "', '"sha256": "0'))
    assert run("--compare", str(tmp_path)) == (1, "pointwise/quantize-fp16 on sm_80: it has changed\n")
    report.write_text('{"kernels": []}')
    assert "there was no such kernel" in run("--compare", str(tmp_path))[1]
    code, error = run("--compare", str(tmp_path / "nothing"))
    assert code == 2
    assert "--out" in error


def test_the_command_writes_what_it_judges(tmp_path: Path) -> None:
    patterns = ("pointwise/*", "norm/layer-1280-3", "hopper/group-statistics-4096x320")
    finished = run_codegen("--arch", "86", "90", "--only", *patterns, "--out", str(tmp_path), "--processes", "1")
    assert finished.returncode == 0, finished.stderr
    kernels = json.loads((tmp_path / "codegen.json").read_text())["kernels"]
    expected = {pair for pair in SURVEYED if pair[1] in (86, 90) and pair[0] in ("pointwise", "norm", "hopper")}
    assert {(kernel["module"], kernel["arch"]) for kernel in kernels} == expected
    for kernel in kernels:
        stem = f"{kernel['module']}-{kernel['name']}-sm_{kernel['arch']}"
        assert kernel["name"] in finished.stdout
        assert (tmp_path / f"{stem}.cubin").read_bytes().startswith(b"\x7fELF")
        if kernel["module"] != "hopper":
            assert f".target sm_{kernel['arch']}" in (tmp_path / f"{stem}.ptx").read_text()
        assert "EXIT" in (tmp_path / f"{stem}.sass").read_text()


def with_addresses(labelled: str) -> str:
    """What `nvdisasm -c` prints, with labels replaced by the addresses of the instructions after them."""
    addresses: dict[str, str] = {}
    waiting: list[str] = []
    for line in labelled.splitlines():
        if actual := re.match(r"(\.L_\w+):|\s*/\*([0-9a-f]+)\*/", line):
            label, address = actual.groups()
            waiting += [label] if label else []
            if address:
                addresses |= dict.fromkeys(waiting, f"0x{address}")
                waiting = []
    return re.sub(r"`\((\.L_\w+)\)", lambda actual: addresses[actual.group(1)], labelled)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_binaries_together_read_as_each_alone(arch: int, tmp_path: Path) -> None:
    names = {"quantize-fp16", "layer-1280-3", "attention-40-4096x77"}
    variants = [variant for module in MODULES for variant in list_variants(module, arch) if variant.name in names]
    cubins = [compile_variant(variant, arch).cubin for variant in variants]
    assert len(cubins) == len(names)
    for cubin, together in zip(cubins, disassemble(cubins, arch), strict=True):
        path = tmp_path / "alone.cubin"
        path.write_bytes(cubin)
        words = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        alone = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        listing = parse(with_addresses(alone))
        assert any(instruction.target is not None for instruction in listing.instructions)
        assert parse(together) == listing


JOBS = list_jobs(ARCHITECTURES)
BATCHES = batch(JOBS)


def test_every_variant_is_in_a_batch() -> None:
    assert [job for jobs in BATCHES for job in jobs] == JOBS
    assert {(module, arch) for module, _, arch in JOBS} == SURVEYED
    assert all(len({arch for _, _, arch in jobs}) == 1 for jobs in BATCHES)


@pytest.mark.parametrize("jobs", BATCHES, ids=[f"sm_{jobs[0][2]}-{number}" for number, jobs in enumerate(BATCHES)])
def test_every_variant_passes(jobs: list[Job]) -> None:
    codes = list(survey(jobs, processes=1))
    assert [(code.module, code.name, code.arch) for code in codes] == jobs
    rejected = {f"{code.module}/{code.name} on sm_{code.arch}": violations(code) for code in codes}
    assert {name: reasons for name, reasons in rejected.items() if reasons} == {}
