"""Sections about single kernels: exactness against the reference, tiles, and times beside torch in float16."""

from __future__ import annotations

import ast
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from edadm_cli.bench.roofline import DevicePeak
from edadm_kernels import backend, tiles
from edadm_kernels.backend import uses_hopper
from edadm_kernels.conv import FEW_PIXELS
from edadm_kernels.hopper import product
from edadm_kernels.launching import arch_of
from gpu.calls import KernelCall, TensorLike, half_precision
from gpu.timing import Clock

# Integers are exact. An epilogue in floating point may use fused operations, which differ in the last place of float16;
# a code may differ by one where a float32 result is in the middle between two codes.
FLOAT_BOUND = 1e-3
# Attention rounds the weights of the values to float16, and also its result before the quantization.
CODE_SHARE_BOUND = 1e-3
ATTENTION_SHARE_BOUND = 1e-2
SEED = 20


class OutOfTime(Exception):
    """The time of a section is over."""


class Budget:
    """The time limit of a section; it is checked before each piece of work.

    Args:
        seconds: The limit.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Returns the seconds that are left."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raises `OutOfTime` when the time is over."""
        if time.monotonic() > self._end:
            raise OutOfTime


def generator(device: torch.device, seed: int = SEED) -> torch.Generator:
    """Returns a seeded generator of a device."""
    return torch.Generator(device).manual_seed(seed)


def exactness(calls: dict[KernelCall, int], device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """Compares each call by the kernel and by the reference on new random inputs, with poisoned memory for the outputs.

    Without a GPU both are the reference unless TRITON_INTERPRET=1.
    """
    for index, call in enumerate(calls):
        budget.check()
        arguments = call.make(generator(device, SEED + index))
        first = _tensors(call.run(arguments))
        for output in first:  # the next result reuses this memory
            output.fill_(float("nan") if output.is_floating_point() else 127)
        del first, output
        actual = _tensors(call.run(arguments))
        again = _tensors(call.run(arguments))
        with backend("reference"):
            expected = _tensors(call.run(arguments))
        repeats = all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
        row = _compared(actual, expected, call)
        yield {"call": call.label(), **row, "repeats": repeats, "ok": row["ok"] and repeats}


def _compared(actual: list[Tensor], expected: list[Tensor], call: KernelCall) -> dict[str, Any]:
    if expected[0].dtype == torch.int8:
        apart = [(f.int() - w.int()).abs() for f, w in zip(actual, expected, strict=True)]
        largest = max(int(a.max()) for a in apart)
        share = max(float((a > 0).float().mean()) for a in apart)
        bound = ATTENTION_SHARE_BOUND if call.operation == "attention_quantize" else CODE_SHARE_BOUND
        return {"max_codes": largest, "share": share, "ok": largest <= 1 and share <= bound}
    f, w = actual[0].double(), expected[0].double()
    error = float((f - w).norm() / w.norm())
    return {"relative_l2": error, "ok": error <= FLOAT_BOUND}  # NaN compares as false


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, list | tuple) else [result]


AnyTile = tiles.Tile | product.ProductTile
Job = tuple[KernelCall, AnyTile | None]
"""A call, and the tile to run it with; `None` for a call that is no product, or for the tile that it would get."""


def shares(jobs: list[Job], workers: int) -> list[list[Job]]:
    """Divides jobs into one share per process; jobs that compile the same code are in one share."""
    alike: dict[tuple[Any, ...], list[Job]] = {}
    for call, tile in jobs:
        what = tuple(_specialized(argument) for argument in call.arguments)
        alike.setdefault((call.operation, tile, what), []).append((call, tile))
    groups = sorted(alike.values(), key=len, reverse=True)
    return [[job for group in groups[first::workers] for job in group] for first in range(workers)]


def _specialized(argument: Any) -> Any:
    """Returns what decides the code: type and divisibility of the sizes of a tensor, or another value itself."""
    if isinstance(argument, TensorLike):
        return argument.dtype, tuple(size % 16 == 0 for size in argument.shape)
    return argument


def compile_share(jobs: list[Job], device: torch.device) -> int:
    """Runs calls once, so that their code is in Triton's cache on disk; returns how many failed."""
    failed, made = 0, dict[KernelCall, list[Any]]()
    for call, tile in jobs:
        if call not in made:
            made = {call: call.make(generator(device))}
        with using(call, tile, device) if call.is_product else nullcontext():
            try:
                call.run(made[call])
            except Exception:  # noqa: BLE001  a tile that does not compile or launch is no candidate; `sweep` says so
                failed += 1
    return failed


def sweep_jobs(calls: dict[KernelCall, int], device: torch.device, limit: int) -> list[Job]:
    """Lists every product with every tile that `sweep` will try."""
    return [(call, tile) for call in calls for tile in candidates_of(call, device, limit)]


@contextmanager
def using(call: KernelCall, tile: AnyTile | None, device: torch.device) -> Iterator[None]:
    """Makes a product run with a given tile, by the kernel of the tile, inside a `with` block."""
    if isinstance(tile, product.ProductTile):
        choose = product.choose
        product.choose = lambda *_: tile  # type: ignore[assignment]
        try:
            yield
        finally:
            product.choose = choose
        return
    if tile is None:
        yield
        return
    table: Any = tiles.MEASURED
    key = tile_key(call, device)
    before = table.get(key)
    table[key] = tile
    tiles.choose.cache_clear()
    try:
        with backend("triton"):
            yield
    finally:
        table.pop(key, None)
        if before is not None:
            table[key] = before
        tiles.choose.cache_clear()


def tile_key(call: KernelCall, device: torch.device) -> tuple[Any, ...]:
    """Returns the key of a product in the table of measured tiles."""
    return (arch_of(torch.empty(0, device=device)), call.kind(), *call.matrix(), call.packed)


def candidates_of(call: KernelCall, device: torch.device, limit: int) -> Sequence[AnyTile]:
    """Returns the best tiles for a product by each kernel's cost model, the one chosen without measuring included."""
    return [*_triton_tiles(call, device, limit), *_hopper_tiles(call, device, limit)]


def _hopper_tiles(call: KernelCall, device: torch.device, limit: int) -> list[product.ProductTile]:
    if device.type != "cuda" or not uses_hopper(torch.empty(0, device=device)) or call.packed:
        return []
    kind: tiles.Kind = call.kind()
    outputs = call.arguments[1].shape[0]
    if kind != "conv":
        shape = product.Shape.matrix(call.matrix()[0], call.matrix()[2])
    else:
        samples, channels, *source = call.arguments[0].shape
        stride, padding, upsample = call.arguments[7:10]
        image, kernel = (samples, *call.output_size()), tuple(call.arguments[1].shape[1:3])
        if math.prod(image) <= FEW_PIXELS or stride > 2:
            return []
        shape = product.Shape(image, tuple(source), channels, kernel, stride, tuple(padding), upsample)
    candidates = product.candidates(kind, shape)
    return sorted(candidates, key=lambda tile: product.cost(kind, tile, shape, outputs))[:limit]


def _triton_tiles(call: KernelCall, device: torch.device, limit: int) -> list[tiles.Tile]:
    arch, kind, m, n, k, packed = tile_key(call, device)
    channels = call.arguments[0].shape[1]
    candidates = tiles.candidates(arch, kind, m, k, channels, packed)
    ordered = sorted(candidates, key=lambda tile: tiles.cost(arch, kind, tile, m, n, k))
    # the best tiles by the cost model, and the best split of every shape of tile: the model may be wrong about one
    by_shape = {(tile.bm, tile.bn, tile.bk): tile for tile in reversed(ordered)}
    both = [*ordered[: limit // 2], *sorted(by_shape.values(), key=ordered.index)]
    return list(dict.fromkeys(both))[:limit]


def sweep(
    calls: dict[KernelCall, int],
    layers: dict[KernelCall, set[str]],
    device: torch.device,
    clock: Clock,
    limit: int,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """Times every product with its candidate tiles, and torch's products in float16 and int8."""
    by_work = sorted(calls, key=lambda call: -calls[call] * math.prod(call.matrix()))
    for index, call in enumerate(by_work):
        budget.check()
        made = [call.make(generator(device, index * 100 + s)) for s in range(clock.sets(call.num_bytes))]
        times: dict[AnyTile, float] = {}
        for tile in candidates_of(call, device, limit) if device.type == "cuda" else []:
            with using(call, tile, device):
                try:
                    times[tile] = clock.launch_us([_launch(call, a) for a in made])
                except Exception as error:  # noqa: BLE001  reported, and no candidate
                    yield {"call": call.label(), "tile": repr(tile), "error": f"{type(error).__name__}: {error}"[:300]}
                    torch.cuda.synchronize(device)
        chosen_us = clock.launch_us([_launch(call, a) for a in made])
        m, n, k = call.matrix()
        best_us = min([chosen_us, *times.values()])
        yield {
            "call": call.label(),
            "count": calls[call],
            "key": tile_key(call, device),
            "adds": call.adds,
            "chosen_us": chosen_us,
            "best_us": best_us,
            "tops": 2 * m * n * k / best_us / 1e6,
            "layers": sorted(layers.get(call, ())),
            "float16_us": clock.launch_us([half_precision(call, a) for a in made]),
            "int_mm_us": _int_mm_us(call, made, clock),
            "tiles": {repr(tile): round(us, 2) for tile, us in sorted(times.items(), key=lambda item: item[1])},
        }


def layer_times(
    calls: dict[KernelCall, int],
    layers: dict[KernelCall, set[str]],
    device: torch.device,
    clock: Clock,
    peak: DevicePeak,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """Times every product as a step runs it, beside float16 and the least time that the peaks of the GPU allow.

    Args:
        calls: The products of a step and how often each occurs.
        layers: The names of their layers in the denoiser.
        device: The device of the kernels.
        clock: The clock that times them.
        peak: The peak rates of the GPU.
        budget: The time limit of the section.
    """
    for row, call in _timed_as_chosen(calls, layers, device, clock, budget):
        m, n, k = call.matrix()
        compute_us = 2 * m * n * k / peak.int8_tops / 1e6
        memory_us = (call.num_bytes + call.output_bytes) / peak.bandwidth_gb_s / 1e3
        yield {
            **row,
            "macs": m * n * k,
            "bytes": call.num_bytes + call.output_bytes,
            "roofline_us": max(compute_us, memory_us),
            "of_roofline": max(compute_us, memory_us) / row["chosen_us"],
            "over_float16": row["float16_us"] / row["chosen_us"],
        }


def _timed_as_chosen(
    calls: dict[KernelCall, int],
    layers: dict[KernelCall, set[str]],
    device: torch.device,
    clock: Clock,
    budget: Budget,
) -> Iterator[tuple[dict[str, Any], KernelCall]]:
    for call in sorted(calls, key=lambda call: -calls[call] * math.prod(call.matrix())):
        for row in sweep({call: calls[call]}, layers, device, clock, 0, budget):
            yield row, call


def memory_bound(
    calls: dict[KernelCall, int], device: torch.device, clock: Clock, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Times every normalization and quantization beside torch's in float16."""
    for index, call in enumerate(calls):
        budget.check()
        made = [call.make(generator(device, index * 100 + s)) for s in range(clock.sets(call.num_bytes))]
        us = clock.launch_us([_launch(call, a) for a in made])
        outputs = len(_tensors(call.run(made[0])))
        moved = call.arguments[0].num_bytes + outputs * torch.Size(call.arguments[0].shape).numel()
        yield {
            "call": call.label(),
            "count": calls[call],
            "us": us,
            "gb_s": moved / us / 1e3,
            "float16_us": clock.launch_us([half_precision(call, a) for a in made]),
        }


def _launch(call: KernelCall, arguments: list[Any]) -> Callable[[], Any]:
    return lambda: call.run(arguments)


def _int_mm_us(call: KernelCall, made: list[list[Any]], clock: Clock) -> float | None:
    """Returns the time of torch's int8 product; `None` for a layer that it does not support."""
    m, n, k = call.matrix()
    if call.operation != "linear" or call.packed or m <= 16 or n % 8 or k % 8:
        return None
    return clock.launch_us([_int_mm(a[0], a[1]) for a in made])


def _int_mm(x: Tensor, weight: Tensor) -> Callable[[], Any]:
    return lambda: torch._int_mm(x, weight.T)


def best_tiles(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], tuple[str, float, float]]:
    """Maps the key of each product of a sweep to its best tile and the microseconds per step before and after.

    Calls that differ only in their epilogue share a key; their times are added, each as often as it occurs.
    """
    totals: dict[tuple[Any, ...], dict[str, float]] = {}
    chosen: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if not row.get("tiles"):
            continue
        key = tuple(row["key"])
        chosen[key] = chosen.get(key, 0.0) + row["count"] * row["chosen_us"]
        summed = totals.setdefault(key, dict.fromkeys(row["tiles"], 0.0))
        for tile in list(summed):
            summed[tile] = summed[tile] + row["count"] * row["tiles"].get(tile, float("inf"))
    best = {key: min(summed, key=summed.__getitem__) for key, summed in totals.items()}
    return {key: (tile, chosen[key], totals[key][tile]) for key, tile in best.items()}


def tile_of(text: str) -> AnyTile:
    """Returns the tile of a `repr`.

    Raises:
        ValueError: The text is something else; nothing of it runs as code.
    """
    kinds: dict[str, type[AnyTile]] = {"Tile": tiles.Tile, "ProductTile": product.ProductTile}
    call = ast.parse(text, mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds) or call.args:
        raise ValueError(f"a tile such as {kinds['Tile'](64, 64, 64, 4, 3)!r} is expected, found {text!r}")
    return kinds[call.func.id](**{str(field.arg): ast.literal_eval(field.value) for field in call.keywords})


def use_tiles(best: dict[tuple[Any, ...], tuple[str, float, float]], gain: float) -> int:
    """Makes products in Triton run with measured tiles that gain at least `gain`; returns how many."""
    table: Any = tiles.MEASURED
    gaining = {key: tile_of(text) for key, (text, before, after) in best.items() if after < (1 - gain) * before}
    used = {key: tile for key, tile in gaining.items() if isinstance(tile, tiles.Tile)}
    table.update(used)
    tiles.choose.cache_clear()
    return len(used)
