"""Times GroupNorm to codes alone on a GPU: with one chunk of pixels per block, and with several.

    python benchmarks/group_norm_chunks.py
    python benchmarks/group_norm_chunks.py --smoke

The inputs do not lie in the cache. Each line has microseconds for one shape of the UNets of Stable Diffusion 1.5 and
XL, and the same with the codes of the input as it is, which the shortcut of a residual block reads. `--smoke` runs a
tiny shape on a CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu.timing import Clock
from gpu.variants import one_chunk_per_block
from torch import Tensor

from edadm_kernels import group_norm_quantize, quantize_joined

GROUPS = 32
# rows, height and width, channels of one image, channels of a second one that follow
SHAPES = (
    *((16, 64, 320, 0), (16, 64, 640, 320), (16, 32, 640, 0), (16, 32, 1280, 640), (16, 16, 1280, 0)),
    *((2, 64, 320, 0), (2, 64, 640, 320), (2, 128, 320, 0), (2, 128, 640, 320), (2, 64, 640, 0), (2, 64, 1280, 640)),
)


def main() -> None:
    """Prints the times of each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    device = torch.device("cpu" if smoke else "cuda")
    clock = Clock(device)
    for rows, size, first, second in ((2, 8, 64, 32),) if smoke else SHAPES:
        sets = clock.sets(2 * rows * size * size * (first + second))
        images = [(image(rows, size, first, device), image(rows, size, second, device)) for _ in range(sets)]
        line = [f"{rows} x {size}x{size}, {first}" + f" + {second} channels" * (second > 0)]
        for raw in (False, True):
            calls = [norm(x, more if second else None, raw) for x, more in images]
            several = clock.launch_us(calls)
            with one_chunk_per_block():
                one = clock.launch_us(calls)
            line.append(f"{'with raw codes: ' * raw}one chunk {one:.1f}, several {several:.1f}")
        if second:
            ends = (torch.tensor([0.03], device=device), torch.tensor([128], dtype=torch.int32, device=device))
            joined = [partial(quantize_joined, x, more, *ends) for x, more in images]
            line.append(f"raw codes by themselves {clock.launch_us(joined):.1f}")
        print("; ".join(line), flush=True)


def image(rows: int, size: int, channels: int, device: torch.device) -> Tensor:
    """Returns a random float16 image, channels last."""
    return torch.randn(rows, size, size, channels, device=device).half().permute(0, 3, 1, 2)


def norm(x: Tensor, more: Tensor | None, raw: bool) -> Callable[[], list[Tensor]]:
    """Returns a function that normalizes an image, or two side by side, to codes, with SiLU."""
    weight = torch.ones(x.shape[1] + (0 if more is None else more.shape[1]), device=x.device)
    count = 1 + raw
    scales = torch.full((count,), 0.03, device=x.device)
    zero_points = torch.full((count,), 128, dtype=torch.int32, device=x.device)
    ends = (scales, zero_points, 8, more, raw)
    return lambda: group_norm_quantize(x, weight, weight, GROUPS, 1e-5, True, *ends)


if __name__ == "__main__":
    main()
