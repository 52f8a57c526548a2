"""The command `python -m edadm_kernels.codegen`."""

from __future__ import annotations

import argparse
import json
import sys
from fnmatch import fnmatch
from pathlib import Path

import triton

from edadm_kernels.codegen.comparison import REPORT, changes, read_report
from edadm_kernels.codegen.compilation import ARCHITECTURES, MODULES
from edadm_kernels.codegen.gate import violations
from edadm_kernels.codegen.machine_code import MachineCode
from edadm_kernels.codegen.survey import Job, list_jobs, survey, to_row

_COLUMNS = (
    "Variant",
    "Arch",
    "Warps",
    "Stages",
    "Regs",
    "Shared",
    "Spills",
    "MMA",
    "PRMT",
    "Loop",
    "/MMA",
    "Async",
    "LDG.128",
)


def main() -> int:
    """Compiles the variants, prints their machine code as a table, and returns 1 if one is rejected or has changed."""
    options = _parser().parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in list_jobs(options.arch, options.module) if _matches(job, options.only)]
    if not jobs:
        patterns = " or ".join(options.only)
        print(f"a variant that matches {patterns} is expected, found none; see --help", file=sys.stderr)
        return 2
    try:
        earlier = None if options.compare is None else read_report(options.compare)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    codes = list(survey(jobs, processes=options.processes, out=options.out))
    rejected = [(code, violations(code)) for code in codes if violations(code)]
    rows = [{**to_row(code), "violations": violations(code)} for code in codes]
    report = json.dumps({"triton": triton.__version__, "kernels": rows}, indent=2)
    if options.out is not None:
        (options.out / REPORT).write_text(report + "\n")
    if options.json:
        print(report)
    else:
        _print_table(codes)
    for code, reasons in rejected:
        print(f"{code.module}/{code.name} on sm_{code.arch}: {'; '.join(reasons)}", file=sys.stderr)
    changed = [] if earlier is None else changes(codes, earlier)
    for clause in changed:
        print(clause, file=sys.stderr)
    return 1 if rejected or changed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edadm_kernels.codegen",
        description="Compile every kernel without a GPU and read its machine code; exit with 1 if the gate rejects it, "
        "or if --compare finds that one has changed.",
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="such as 90 for sm_90"
    )
    parser.add_argument(
        "--module", nargs="+", choices=MODULES, default=list(MODULES), help="only kernels of these modules"
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="only variants such as 'gemm/geglu-*'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="folder to write cubin, PTX, SASS and codegen.json to")
    parser.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="what --out wrote before a change that should change no kernel"
    )
    parser.add_argument("--processes", type=int, default=2, help="number of compilations at a time")
    return parser


def _matches(job: Job, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatch(f"{job[0]}/{job[1]}", pattern) for pattern in patterns)


def _print_table(codes: list[MachineCode]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Machine code by Triton {triton.__version__}", box=None)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for code in codes:
        table.add_row(*_cells(code), style="red" if violations(code) else None)
    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(table)


def _cells(code: MachineCode) -> list[str]:
    loop = ["-"] * 5
    if code.loop_mma:
        loop = [
            f"{code.loop_mma} {code.mma}",
            str(code.loop_prmt),
            str(code.loop_instructions),
            f"{code.instructions_per_mma:.1f}",
            str(code.loop_copies),
        ]
    head = [f"{code.module}/{code.name}", str(code.arch), str(code.num_warps), str(code.num_stages)]
    return [
        *head,
        str(code.registers),
        str(code.shared_bytes),
        str(code.spills),
        *loop,
        f"{code.wide_loads}/{code.loads}",
    ]


if __name__ == "__main__":
    sys.exit(main())
