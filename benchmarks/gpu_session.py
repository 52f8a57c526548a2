"""Runs a whole session on a GPU: exactness, the best tiles, the time of a step, and the kernels that take it.

    python benchmarks/gpu_session.py --out session.jsonl
    python benchmarks/gpu_session.py --sections times,profile --compile --out compiled.jsonl
    python benchmarks/gpu_session.py --smoke

Every result is a line of JSON and is written at once, so that a session that is interrupted keeps what it has. Nothing
is downloaded. `--smoke` runs every section on a CPU with a tiny network and the reference of the kernels: its times
mean nothing, but its paths are those of the real run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import kernels, machine, steps
from gpu.ahead import compile_ahead
from gpu.calls import CallRecorder
from gpu.kernels import Budget, OutOfTime
from gpu.timing import Clock
from tile_table import GAIN
from torch import nn

SECONDS = {
    "environment": 30,
    "tests": 120,
    "warm": 90,
    "parity": 90,
    "exactness": 60,
    "times": 120,
    "profile": 40,
    "memory": 30,
    "attention": 20,
    "norms": 30,
    "layers": 90,
    "sweep": 200,
    "tuned": 60,
}
PATIENCE = 560
"""Seconds of the whole session: a section that would end later by its budget is skipped."""


class Session:
    """Runs sections and writes their results.

    Args:
        options: The options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.clock = Clock(self.device)
        self._out = open(options.out, "a", buffering=1) if options.out else None  # noqa: SIM115
        self._started = time.monotonic()
        self._networks: steps.Networks | None = None
        self._recorded: dict[int, CallRecorder] = {}
        self._contenders: dict[int, dict[str, Callable[[], Any]]] = {}
        self.swept: list[dict[str, Any]] = []

    @property
    def networks(self) -> steps.Networks:
        """Returns the network under test."""
        if self._networks is None:
            smoke = self.options.smoke
            make = tiny if smoke else None
            self._networks = steps.Networks(self.options.model, self.device, 8 if smoke else None, make)
        return self._networks

    def run(self, name: str) -> None:
        """Runs a section; its failure is written and does not keep the others from running."""
        budget = self.options.seconds.get(name, SECONDS[name])
        if time.monotonic() - self._started + budget > self.options.patience:
            self.write(name, {"skipped": "no time left"})
            return
        started = time.monotonic()
        try:
            with torch.no_grad():
                for row in getattr(self, f"_{name}")(Budget(budget)):
                    self.write(name, row)
        except OutOfTime:
            self.write(name, {"stopped": f"after {budget} s"})
        except Exception as error:  # noqa: BLE001
            self.write(name, {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]})
        self.write(name, {"seconds": round(time.monotonic() - started, 1)})

    def write(self, section: str, row: dict[str, Any]) -> None:
        """Writes one result, shortened to the terminal and whole to the file."""
        line = json.dumps({"section": section, **row}, default=str)
        if self._out:
            self._out.write(line + "\n")
        print(line if len(line) < 700 or "by_name" not in row else table(section, row), flush=True)

    def recorded(self, rows: int) -> CallRecorder:
        """Returns what a W8A8 step launches."""
        if rows not in self._recorded:
            recorder = steps.record_calls(self.networks, "w8a8", rows, torch.float16)
            self._recorded[rows] = recorder
            counts: dict[str, int] = {}
            for call, count in recorder.calls.items():
                counts[call.operation] = counts.get(call.operation, 0) + count
            self.write("calls", {"rows": rows, "edadm": counts, "names": len(recorder.calls)})
        return self._recorded[rows]

    def calls(self, rows: int, products: bool) -> dict[Any, int]:
        """Returns the kernel calls of a W8A8 step with their counts."""
        return {call: count for call, count in self.recorded(rows).calls.items() if call.is_product == products}

    def contenders(self, rows: int) -> dict[str, Callable[[], Any]]:
        """Returns a function per contender that runs one step."""
        if rows not in self._contenders:
            self._contenders[rows] = steps.contenders(self.networks, rows, self.options.compile)
        return self._contenders[rows]

    def _environment(self, budget: Budget) -> Iterator[dict[str, Any]]:
        yield machine.versions()
        if self.device.type == "cuda":
            yield machine.gpu_facts(self.device)
            yield machine.measured_peaks(self.device, self.clock)

    def _tests(self, budget: Budget) -> Iterator[dict[str, Any]]:
        if self.device.type != "cuda":
            yield {"skipped": "the tests in tests/gpu skip themselves without a GPU"}
            return
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *self.options.tests]
        seconds = self.options.seconds.get("tests", SECONDS["tests"])
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired as expired:
            yield {"stopped": f"after {seconds} s", "tail": str(expired.stdout or "")[-3000:]}
            return
        yield {"code": done.returncode, "tail": (done.stdout + done.stderr)[-4000:]}

    def _parity(self, budget: Budget) -> Iterator[dict[str, Any]]:
        for bits in ("w8a8", "w4a8"):
            budget.check()
            yield from steps.parity(self.networks, self.options.rows[0], bits)

    def _exactness(self, budget: Budget) -> Iterator[dict[str, Any]]:
        rows = self.options.rows[0]
        calls = {**self.calls(rows, True), **self.calls(rows, False)}
        compared = []
        for row in kernels.exactness(calls, self.device, budget):
            compared.append(row)
            if not row["ok"]:
                yield row
        by_operation: dict[str, dict[str, float]] = {}
        for row in compared:
            worst = by_operation.setdefault(row["call"].split()[0], {})
            for key in ("relative_l2", "share"):
                if key in row:
                    worst[key] = max(worst.get(key, 0.0), row[key])
        yield {"calls": len(compared), "wrong": sum(not row["ok"] for row in compared), "worst": by_operation}

    def _times(self, budget: Budget) -> Iterator[dict[str, Any]]:
        for rows in self.options.rows:
            budget.check()
            yield from steps.times(self.contenders(rows), rows, self.clock, self.options.rounds)

    def _profile(self, budget: Budget) -> Iterator[dict[str, Any]]:
        for rows in self.options.rows:
            for name in ("fp16 in a CUDA graph", "fp16 compiled in a CUDA graph", "w8a8"):
                budget.check()
                if name in self.contenders(rows):
                    yield {
                        "contender": name,
                        "rows": rows,
                        **steps.kernel_table(self.contenders(rows)[name], self.device),
                    }

    def _memory(self, budget: Budget) -> Iterable[dict[str, Any]]:
        return steps.memory(self.networks, self.options.rows[0])

    def _attention(self, budget: Budget) -> Iterator[dict[str, Any]]:
        for rows in self.options.rows:
            budget.check()
            attentions = steps.record_attention(self.networks, rows).attentions
            for row in steps.attention_times(attentions, self.device, self.clock):
                yield {"rows": rows, **row}

    def _warm(self, budget: Budget) -> Iterator[dict[str, Any]]:
        """Compiles, in parallel, what the contenders and the parity check will run."""
        first = self.options.rows[0]
        recorded = [self.recorded(rows) for rows in self.options.rows]
        recorded.append(steps.record_calls(self.networks, "w8a8", first, torch.float32))
        recorded += [steps.record_calls(self.networks, "w4a8", r, torch.float16, True) for r in self.options.rows]
        calls = dict.fromkeys(call for recorder in recorded for call in recorder.calls)
        yield compile_ahead([(call, None) for call in calls], budget.left)

    def _layers(self, budget: Budget) -> Iterator[dict[str, Any]]:
        """Times every product beside float16 and the roofline, those with the most work first."""
        peak = machine.peaks(self.device, self.clock)
        for rows in self.options.rows:
            calls, names = self.calls(rows, True), self.recorded(rows).layers
            for row in kernels.layer_times(calls, names, self.device, self.clock, peak, budget):
                yield {"rows": rows, **row}

    def _sweep(self, budget: Budget) -> Iterator[dict[str, Any]]:
        calls = [self.calls(rows, True) for rows in self.options.rows]
        if self.device.type == "cuda":
            limit = self.options.tiles
            jobs = [job for step in calls for job in kernels.sweep_jobs(step, self.device, limit)]
            yield compile_ahead(jobs, 0.6 * budget.left)
        for rows, step in zip(self.options.rows, calls, strict=True):
            layers = self.recorded(rows).layers
            for row in kernels.sweep(step, layers, self.device, self.clock, self.options.tiles, budget):
                self.swept.append(row)
                yield {"rows": rows, **row}

    def _tuned(self, budget: Budget) -> Iterator[dict[str, Any]]:
        """Times a step with the best tiles of the sweep beside the contenders."""
        used = kernels.use_tiles(kernels.best_tiles(self.swept), GAIN)
        yield {"tiles": used}
        for rows in self.options.rows:
            budget.check()
            ready = {name: call for name, call in self.contenders(rows).items() if name.startswith(("fp", "w8a8"))}
            call = self.networks.call(rows, torch.float16)
            tuned = self.networks.compiled("w8a8", rows, torch.float16)
            ready["w8a8 tuned"] = partial(tuned, *call[0], **call[1])
            yield from steps.times(ready, rows, self.clock, self.options.rounds)
            yield {"contender": "w8a8 tuned", "rows": rows, **steps.kernel_table(ready["w8a8 tuned"], self.device)}

    def _norms(self, budget: Budget) -> Iterator[dict[str, Any]]:
        for rows in self.options.rows:
            yield from kernels.memory_bound(self.calls(rows, False), self.device, self.clock, budget)


def tiny() -> nn.Module:
    """Builds a UNet with 64 and 128 channels for a trial run."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def table(section: str, row: dict[str, Any]) -> str:
    """Returns a table of kernels to read."""
    head = f"[{section}] {row['contender']}, {row['rows']} rows: {row['kernels']} kernels, {row['kernel_ms']:.3f} ms"
    lines = [f"  {k['us']:9.1f} us  {k['count']:4d} x {k['us_each']:8.2f}  {k['name']}" for k in row["by_name"]]
    return "\n".join([head, *lines])


def slower_than_float16(swept: list[dict[str, Any]]) -> str:
    """Returns a line for each product that float16 runs faster than the best tile."""
    lines = []
    for row in swept:
        if "best_us" in row and row["best_us"] > row["float16_us"]:
            times = f"{row['best_us']:.1f} us, float16 {row['float16_us']:.1f} us, {row['count']} times per step"
            lines.append(f"slower than float16: {row['call']}: {times}")
    return "\n".join(lines)


def seconds_of(text: str) -> tuple[str, float]:
    """Returns `sweep=120` as a pair."""
    name, _, value = text.partition("=")
    return name, float(value)


def arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to which lines of JSON are appended")
    parser.add_argument("--sections", default=",".join(SECONDS), help="sections, in this order")
    parser.add_argument("--seconds", type=seconds_of, nargs="*", default=[], help="time limits, such as sweep=120")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="time limit of the whole session in seconds")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16], help="batch sizes, guidance branches included")
    parser.add_argument("--model", default="sd15-random")
    parser.add_argument("--rounds", type=int, default=12, help="rounds over the contenders")
    parser.add_argument("--tiles", type=int, default=8, help="tiles to try per product")
    parser.add_argument("--compile", action="store_true", help="add torch.compile to the contenders: minutes")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], help="what pytest runs")
    parser.add_argument("--smoke", action="store_true", help="every section on a CPU with a tiny network")
    options = parser.parse_args()
    options.seconds = dict(options.seconds)
    if options.smoke:
        options.rows, options.rounds = [2], 2
    return options


def main() -> None:
    """Runs the sections that the command line names."""
    torch.backends.cudnn.benchmark = True  # float16 convolutions get the fastest algorithm
    session = Session(arguments())
    run: Callable[[str], None] = session.run
    for name in session.options.sections.split(","):
        run(name)
    if session.swept:
        print(slower_than_float16(session.swept))


if __name__ == "__main__":
    main()
