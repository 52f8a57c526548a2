"""Times choices between kernels alone on a GPU: how rows of a normalization are divided, which product adds a residual.

    python benchmarks/gpu_choices.py
    python benchmarks/gpu_choices.py rows --channels 1536
    python benchmarks/gpu_choices.py --smoke

Section `rows` divides the rows of LayerNorm and of adaptive LayerNorm among programs of one to eight warps; a line has
microseconds of each division, with inputs that do not lie in the cache and with inputs that do, and marks the present
one with a star. Section `residuals` times products of UNets by the kernel for large matrices and by the other one,
alone and with a residual, and the addition of a residual in torch. Every line is JSON. `--compile-only` fills the cache
of compiled kernels and times nothing, so that processes for several numbers of channels can do so at the same time.
`--smoke` runs tiny shapes on a CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from gpu.timing import Clock
from gpu.variants import residuals_in_other_products
from torch import Tensor

import edadm_kernels as kernels
from edadm_kernels import norm_launch
from edadm_kernels.hopper import matrices
from edadm_kernels.norm_plans import LayerPlan, layer_plan

# samples, tokens per sample, channels; whether a scale and a shift per sample follow
ROWS: tuple[tuple[int, int, int, bool], ...] = (
    *((2, 4096, 1536, True), (2, 4096, 1152, True), (64, 256, 1152, True), (1, 4096, 3072, True)),
    *((16, 4096, 320, False), (16, 1024, 640, False), (16, 256, 1280, False)),
    *((2, 4096, 320, False), (2, 1024, 640, False), (2, 256, 1280, False)),
    *((2, 4096, 640, False), (2, 1024, 1280, False)),
)
# rows, outputs, terms per sum
PRODUCTS = (
    *((65536, 320, 320), (65536, 320, 1280), (16384, 640, 640), (16384, 640, 2560), (4096, 1280, 1280)),
    *((4096, 1280, 5120), (8192, 320, 320), (8192, 320, 1280), (8192, 640, 640), (8192, 640, 2560)),
    *((2048, 640, 640), (2048, 640, 2560), (2048, 1280, 1280), (2048, 1280, 5120)),
    *((65536, 960, 320), (16384, 1920, 640), (4096, 3840, 1280), (8192, 960, 320), (8192, 1920, 640)),
)
ELEMENTS_PER_THREAD = (16, 52)


def divisions(channels: int) -> Iterator[LayerPlan]:
    """Yields the present division of rows into programs, and others with as many elements per thread as fit."""
    present = layer_plan(channels, 90)
    yield present
    for warps in (1, 2, 4, 8):
        for rows in (1, 2, 4, 8, 16):
            plan = LayerPlan(channels, present.head, present.tail, rows, warps)
            fewest, most = ELEMENTS_PER_THREAD
            if plan != present and fewest <= rows * channels / (32 * warps) <= most:
                yield plan


def norm_calls(
    shape: tuple[int, int, int, bool], sets: int, device: torch.device
) -> list[Callable[[], Tensor | list[Tensor]]]:
    """Returns one call of a normalization to codes per set of inputs."""
    samples, tokens, channels, is_modulated = shape
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    inputs = [torch.randn(samples, tokens, channels, device=device).to(dtype) for _ in range(sets)]
    vectors = torch.randn(samples, 6, channels, device=device).to(dtype)
    one = torch.full((1,), 0.03, device=device)
    if is_modulated:
        ends = (vectors[:, 1], vectors[:, 0], 1e-6, one, torch.zeros_like(one))
        return [partial(kernels.modulated_norm_quantize, x, *ends) for x in inputs]
    zero_point = torch.full((1,), 128, dtype=torch.int32, device=device)
    weight, bias = vectors[0, 0].float(), vectors[0, 1].float()
    return [partial(kernels.layer_norm_quantize, x, weight, bias, 1e-5, one, zero_point) for x in inputs]


def time_rows(
    clock: Clock, device: torch.device, shapes: tuple[tuple[int, int, int, bool], ...], prepare: bool
) -> None:
    """Prints a line per shape with the times of each division."""
    for shape in shapes:
        samples, tokens, channels, _ = shape
        sets = 1 if prepare else clock.sets(3 * samples * tokens * channels)
        calls = norm_calls(shape, sets, device)
        times: dict[str, list[float]] = {}
        for place, plan in enumerate(divisions(channels)):
            with patch.object(norm_launch, "layer_plan", lambda *_, plan=plan: plan):
                if prepare:
                    calls[0]()
                    continue
                name = f"{plan.block_rows} rows, {plan.num_warps} warps" + "*" * (place == 0)
                times[name] = [round(clock.launch_us(calls), 2), round(clock.launch_us(calls[:1]), 2)]
        if not prepare:
            ordered = dict(sorted(times.items(), key=lambda item: item[1][0]))
            print(json.dumps({"rows": [samples * tokens, channels, shape[3]], "cold, warm us": ordered}), flush=True)


def time_residuals(clock: Clock, device: torch.device, shapes: tuple[tuple[int, int, int], ...]) -> None:
    """Prints a line per product with the times of both kernels that add a residual."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for m, n, k in shapes:
        sets = clock.sets(m * k + n * k + 4 * m * n)
        x, w = ([codes(rows, k, device) for _ in range(sets)] for rows in (m, n))
        scale = torch.rand(n, device=device) * 1e-4
        ends = (scale, torch.zeros(n, dtype=torch.int32, device=device), torch.zeros(n, device=device))
        residuals = [torch.randn(m, n, device=device).to(dtype) for _ in range(sets)]
        products = [kernels.linear(a, b, *ends, out_dtype=dtype) for a, b in zip(x, w, strict=True)]
        operands = list(zip(x, w, residuals, strict=True))
        alone = [partial(kernels.linear, a, b, *ends, out_dtype=dtype) for a, b, _ in operands]
        times = {}
        for name, choose in (("large", matrices.choose), ("other", lambda *_, **__: None)):
            with patch.object(matrices, "choose_over_single", choose):
                times[name] = clock.launch_us(alone)
        lists: dict[str, list[Callable[[], Tensor]]] = {
            "large, residual": [partial(kernels.linear_added, a, b, *ends, r) for a, b, r in operands],
            "other, residual": [partial(kernels.linear, a, b, *ends, r, dtype) for a, b, r in operands],
            "addition": [partial(torch.add, y, r) for y, r in zip(products, residuals, strict=True)],
        }
        with residuals_in_other_products():  # `linear_added` takes the kernel for large matrices all the same
            times |= {name: clock.launch_us(calls) for name, calls in lists.items()}
        times = {name: round(value, 2) for name, value in times.items()}
        print(json.dumps({"product": [m, n, k], "us": times}), flush=True)


def codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns random codes of the whole range."""
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device)


def main() -> None:
    """Prints the times of the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["rows", "residuals"], help="`rows` and `residuals`")
    parser.add_argument("--channels", type=int, help="only rows of so many channels")
    parser.add_argument("--compile-only", action="store_true", help="compile what section `rows` needs; time nothing")
    parser.add_argument("--smoke", action="store_true", help="run tiny shapes on a CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    clock = Clock(device)
    listed = ((2, 8, 64, True), (2, 8, 64, False)) if options.smoke else ROWS
    rows = tuple(shape for shape in listed if options.channels in (None, shape[2]))
    if "rows" in options.sections:
        time_rows(clock, device, rows, options.compile_only)
    if "residuals" in options.sections and not options.compile_only:
        time_residuals(clock, device, ((16, 32, 64),) if options.smoke else PRODUCTS)


if __name__ == "__main__":
    main()
