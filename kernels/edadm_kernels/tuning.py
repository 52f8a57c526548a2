"""Times every tile on a GPU, shape by shape, and prints the best as entries of `tiles.MEASURED`.

    python -m edadm_kernels.tuning > measured.txt

A shape is timed by replaying a CUDA graph of many calls, each with its own copy of the weights, so that they come from
memory as they do in a network while the activations may stay in the L2. Tiles must agree bit for bit to be timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from edadm_kernels.conv_launch import Geometry, launch_conv
from edadm_kernels.gemm_launch import arch_of, launch_gemm
from edadm_kernels.pack import conv_border_table, linear_correction, pack_w4
from edadm_kernels.tiles import Kind, Tile, candidates, choose

WEIGHT_BYTES = 192 << 20  # more than any L2
MAX_COPIES = 24
SAME = Geometry(1, 3, 3, (1, 1, 1, 1))
POINTWISE = Geometry(1, 1, 1, (0, 0, 0, 0))


@dataclass(frozen=True)
class Product:
    """A layer to time.

    Args:
        name: Where it occurs.
        kind: `conv` also for pointwise convolutions, which run as `linear`.
        samples: Images; 1 for a linear layer.
        height: Of the input; rows of a linear layer.
        width: Of the input; 1 for a linear layer.
        channels: Input channels.
        outputs: Output channels (2 F of a gated layer).
        geometry: Of a convolution.
    """

    name: str
    kind: Kind
    samples: int
    height: int
    width: int
    channels: int
    outputs: int
    geometry: Geometry = POINTWISE

    @property
    def table_kind(self) -> Kind:
        """The kind under which `tiles.choose` looks it up."""
        return "linear" if self.kind == "conv" and self.geometry.pointwise else self.kind

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        grown = 2 if self.geometry.upsample else 1
        top, bottom, left, right = self.geometry.padding
        stride = self.geometry.stride
        return (
            (self.height * grown + top + bottom - self.geometry.kh) // stride + 1,
            (self.width * grown + left + right - self.geometry.kw) // stride + 1,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""
        height, width = self.out_size
        return self.samples * height * width, self.outputs, self.channels * self.geometry.kh * self.geometry.kw


@dataclass(frozen=True)
class Timing:
    """Median time of a call."""

    tile: Tile
    milliseconds: float


def tune(product: Product, packed: bool = False, device: str = "cuda") -> list[Timing]:
    """Times of every candidate tile, the fastest first.

    Raises:
        RuntimeError: Two tiles disagree.
    """
    layer = _Layer(product, packed, torch.device(device))
    arch = arch_of(layer.x)
    wanted: Tensor | None = None
    timings = []
    for tile in _grid(arch, product, packed):
        found = layer.run(tile, 0).clone()
        if wanted is not None and not torch.equal(found, wanted):
            raise RuntimeError(f"equal results of all tiles are wanted for {product}, found others by {tile}")
        wanted = found
        timings.append(Timing(tile, time_calls(partial(layer.run, tile), layer.copies)))
    return sorted(timings, key=lambda timing: timing.milliseconds)


def time_calls(call: Callable[[int], object], copies: int, replays: int = 15) -> float:
    """Milliseconds of one `call(copy)`: the median replay of a graph with a call for each copy, twice over."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = 2 * max(copies, 5)
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index % copies)
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[2:])


def sd15_products(batch: int = 2) -> list[Product]:
    """The distinct layers of Stable Diffusion 1.5's denoiser at 64x64 latents."""
    found = []
    for size, outputs, inputs in (
        (64, 320, (320, 640, 960)),
        (32, 640, (320, 640, 960, 1280, 1920)),
        (16, 1280, (640, 1280, 1920, 2560)),
        (8, 1280, (1280, 2560)),
    ):
        for channels in inputs:
            place = f"{channels}-{outputs}@{size}"
            found.append(Product(f"conv3x3 {place}", "conv", batch, size, size, channels, outputs, SAME))
            found.append(Product(f"conv1x1 {place}", "conv", batch, size, size, channels, outputs))
        rows = batch * size * size
        for name, kind, n, k in (
            ("query", "linear", outputs, outputs),
            ("query-key-value", "linear", 3 * outputs, outputs),
            ("feed-forward in", "geglu", 8 * outputs, outputs),
            ("feed-forward out", "linear", outputs, 4 * outputs),
        ):
            found.append(Product(f"{name} {outputs}@{size}", kind, 1, rows, 1, k, n))  # type: ignore[arg-type]
    for size, channels in ((64, 320), (32, 640), (16, 1280)):
        halved = replace(SAME, stride=2)
        found.append(Product(f"down {channels}@{size}", "conv", batch, size, size, channels, channels, halved))
    for size, channels in ((8, 1280), (16, 1280), (32, 640)):
        doubled = replace(SAME, upsample=True)
        found.append(Product(f"up {channels}@{size}", "conv", batch, size, size, channels, channels, doubled))
    return found


class _Layer:
    """Random operands of a product; the weights several times over."""

    def __init__(self, product: Product, packed: bool, device: torch.device) -> None:
        self.product = product
        m, n, k = product.sizes
        generator = torch.Generator(device).manual_seed(0)
        gated = product.kind == "geglu"
        self.x = _codes((product.samples, product.height, product.width, product.channels), 128, generator)
        geometry = product.geometry
        codes = _codes((n, geometry.kh, geometry.kw, product.channels), 8 if packed else 128, generator)
        weight = pack_w4(codes) if packed else codes
        self.copies = min(MAX_COPIES, max(1, WEIGHT_BYTES // weight.numel()))
        self.weights = [weight.clone() for _ in range(self.copies)]
        self.scale = torch.rand(n, generator=generator, device=device) * 1e-5
        self.bias = torch.randn(n, generator=generator, device=device).half()
        self.out = torch.empty((m, n // 2), dtype=torch.int8, device=device) if gated else None
        shape = (product.samples, *product.out_size, n)
        self.residual = torch.randn(shape, generator=generator, device=device).half().permute(0, 3, 1, 2)
        if product.kind == "conv" and not geometry.pointwise:
            self.correction = conv_border_table(codes, 100, geometry.padding)
        else:
            self.correction = linear_correction(codes.reshape(n, k), 100)
        self.quantizer = (torch.tensor(0.02, device=device), torch.tensor(120, dtype=torch.int32, device=device), 255)

    def run(self, tile: Tile, copy: int) -> Tensor:
        """The output of one call."""
        weight = self.weights[copy]
        if self.out is not None:
            launch_gemm(tile, self.x, weight, self.scale, self.correction, self.bias, self.out, geglu=self.quantizer)
            return self.out
        out = torch.empty_like(self.residual)
        image = self.x.permute(0, 3, 1, 2)
        launch_conv(
            tile, self.product.geometry, image, weight, self.scale, self.correction, self.bias, None, self.residual, out
        )
        return out


def _codes(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-limit, limit, shape, generator=generator, device=generator.device, dtype=torch.int8)


def _grid(arch: int, product: Product, packed: bool) -> Iterator[Tile]:
    m, _, k = product.sizes
    for tile in candidates(arch, product.table_kind, m, k, product.channels, packed):
        yield tile
        if product.table_kind == "conv":
            yield replace(tile, taps_inner=not tile.taps_inner)


def main() -> int:
    """Time the layers of Stable Diffusion 1.5 and print the table."""
    parser = argparse.ArgumentParser(prog="python -m edadm_kernels.tuning", description=__doc__)
    parser.add_argument("--batch", type=int, default=2, help="images, guidance included")
    parser.add_argument("--packed", action="store_true", help="four-bit weights unpacked in the kernel")
    parser.add_argument("--only", default="", help="only layers whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning wants a CUDA device, found none", file=sys.stderr)
        return 4
    for product in sd15_products(options.batch):
        if options.only not in product.name:
            continue
        timings = tune(product, options.packed)
        m, n, k = product.sizes
        arch = arch_of(torch.empty(0, device="cuda"))
        modelled = choose(arch, product.table_kind, m, n, k, product.channels, options.packed)
        best = timings[0]
        found = next((timing.milliseconds for timing in timings if timing.tile == modelled), float("nan"))
        tera = 2 * m * n * k / best.milliseconds / 1e9
        print(f"    # {product.name}: {best.milliseconds:.4f} ms, {tera:.0f} TOPS; the table's tile {found:.4f} ms")
        key = (arch, product.table_kind, m, n, k, options.packed)
        print(f"    {key!r}: {best.tile!r},", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
