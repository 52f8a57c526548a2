"""Measures what a rotation of a layer's input costs: its codes with and without, each compiled as one graph.

    python benchmarks/rotation_cost.py --device cuda
    python benchmarks/rotation_cost.py --smoke

Every row is an input of a linear layer, `tokens x channels` in float16. The median time of its codes is printed in
microseconds, without a transform and with the rotations of 16, 64 and 256 channels, beside that of the layer's product
in float16. `--smoke` runs one small size on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from edadm_cli.quant.grid import activation_grid
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.transforms import transform_named

SHAPES = ((2 * 256, 1152), (32 * 256, 1152), (2 * 4096, 320), (2 * 4096, 1280), (4608, 3072), (4608, 12288))
NAMES = ("none", "hadamard-16", "hadamard-64", "hadamard-256")
ROUNDS, CALLS = 9, 20


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median over rounds of the time per call."""
    many, times = _many(call, device), []
    for _ in range(ROUNDS + 2):
        _wait(device)
        start = time.perf_counter()
        many()
        _wait(device)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[2:])


def _many(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns a function that makes `CALLS` calls; on CUDA as one graph, so that launches do not count."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    if device.type != "cuda":
        return calls
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _codes(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a compiled function from an input to its int8 codes."""
    quantizer = InputQuantizer(
        activation_grid(4),
        torch.tensor(0.5, device=device),
        torch.tensor(7, dtype=torch.int32, device=device),
        -1,
        None if name == "none" else transform_named(name),
    )
    return torch.compile(lambda x: quantizer.codes(x).to(torch.int8), dynamic=False)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="one small size on a CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else options.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    print("| tokens | channels | " + " | ".join(NAMES) + " | product to as many channels |")
    print("|---|---|" + "---|" * (len(NAMES) + 1))
    for tokens, channels in ((8, 256),) if options.smoke else SHAPES:
        torch._dynamo.reset()
        x = torch.randn(tokens, channels, device=device, dtype=torch.float16)
        weight = torch.randn(channels, channels, device=device, dtype=torch.float16)
        times = [microseconds(partial(_codes(name, device), x), device) for name in NAMES]
        times.append(microseconds(partial(torch.matmul, x, weight), device))
        print(f"| {tokens} | {channels} | " + " | ".join(f"{spent:.1f}" for spent in times) + " |", flush=True)


if __name__ == "__main__":
    main()
