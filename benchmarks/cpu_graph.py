"""Shows what OpenVINO executes of a quantized denoiser, and the size, time and memory of writing and loading its files.

    python benchmarks/cpu_graph.py --model sd15-random --bits w8a8 --attention --threads 2

Weights are rounded to nearest on the min-max ranges of one call. Writing and loading run in separate processes, so that
each has a separate peak of memory; the peak of writing includes the torch denoiser.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions, OperationTime
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_denoiser
from edadm_cli.recipe import AttentionRecipe, RangeRecipe, Recipe

CALL = "call.pt"


def make(folder: Path, model: str, bits: str, attention: bool) -> dict[str, float]:
    """Quantizes the model and writes the engine's files; prints the seconds of the conversion."""
    recipe = Recipe(
        name="nearest",
        ranges=RangeRecipe(weight="minmax", activation="minmax"),
        attention=AttentionRecipe(quantize=attention),
    )
    denoiser = build_denoiser(model).requires_grad_(False)
    args, kwargs = example_call(denoiser, batch_size=1)
    quantize_to_nearest(denoiser, recipe, BitWidth.parse(bits), [(args, kwargs)])
    torch.save((args, kwargs), folder / CALL)
    start = time.perf_counter()
    OpenVinoEngine().save(denoiser, args, kwargs, EngineOptions(torch.device("cpu")), folder)
    return {"convert and write, s": time.perf_counter() - start}


def run(folder: Path, threads: int, rest: str, repeats: int) -> dict[str, Any]:
    """Loads the files, times calls, and profiles one."""
    args, kwargs = torch.load(folder / CALL, weights_only=True)
    options = EngineOptions(torch.device("cpu"), getattr(torch, rest), threads)
    start = time.perf_counter()
    compiled = OpenVinoEngine().load(folder, options)
    loaded = time.perf_counter() - start
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compiled(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
    peak = _peak_mib()  # before profiling, which compiles a second graph
    rows = compiled.profile(*args, **kwargs)
    layers = compiled.layers
    return {
        "load and compile, s": loaded,
        "call, ms (median)": statistics.median(seconds[1:]) * 1e3,
        "call, ms (min)": min(seconds[1:]) * 1e3,
        "peak memory, MiB": peak,
        "layers planned as integers": sum(layer.planned != "float" for layer in layers),
        "of which not in int8": [layer.name for layer in layers if not layer.is_met],
        "kinds": _by_kind(rows),
        "longest": [[r.name, r.kind, r.precision, r.milliseconds] for r in sorted(rows, key=_time, reverse=True)[:12]],
    }


def _time(row: OperationTime) -> float:
    return row.milliseconds


def _by_kind(rows: list[OperationTime]) -> list[list[Any]]:
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        totals[row.kind, row.precision].append(row.milliseconds)
    table = [[kind, precision, len(times), sum(times)] for (kind, precision), times in totals.items()]
    return sorted(table, key=lambda line: -line[3])


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_process(stage: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", folder]
    facts: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return facts


def main() -> None:
    """Writes the files, loads them, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15-random")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--attention", action="store_true", help="quantize the two products of attention as well")
    parser.add_argument("--rest", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--stage", choices=("make", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage == "make":
        torch.set_num_threads(options.threads)
        made = make(Path(options.folder), options.model, options.bits, options.attention)
        print(json.dumps(made | {"peak memory of making, MiB": _peak_mib()}))
        return
    if options.stage == "run":
        print(json.dumps(run(Path(options.folder), options.threads, options.rest, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = _in_process("make", folder)
        facts["files, MiB"] = sum(file.stat().st_size for file in Path(folder).glob("denoiser.*")) / 2**20
        facts |= _in_process("run", folder)
    for name, value in facts.items():
        if not isinstance(value, list):
            print(f"{name:28} {value:10.1f}")
    print("not in int8:", ", ".join(facts["of which not in int8"]) or "none")
    print(f"\n{'kind':12} {'precision':10} {'count':>6} {'ms':>8}")
    for kind, precision, count, milliseconds in facts["kinds"]:
        print(f"{kind:12} {precision:10} {count:6} {milliseconds:8.1f}")
    print()
    for name, kind, precision, milliseconds in facts["longest"]:
        print(f"{milliseconds:8.1f} ms  {kind:10} {precision:9} {name}")


if __name__ == "__main__":
    main()
