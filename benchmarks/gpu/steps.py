"""Sections about whole steps: parity, times of contenders, memory, and the kernels that take the time."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.cuda.fused_blocks.assembly import Assembly
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.profiling import wrapped_products
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.models.random_models import build_denoiser, example_call
from edadm_cli.recipe import RangeRecipe, Recipe
from gpu.calls import CallRecorder, TensorLike
from gpu.timing import Clock, spread

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Speed does not depend on the ranges, so they are those of one batch.
RECIPE = Recipe(name="extremes", ranges=RangeRecipe(weight="minmax", activation="minmax"))


class Networks:
    """One denoiser in the forms that are compared, each built when it is first used.

    Args:
        name: A model such as `sd15-random`.
        device: The device of all forms.
        size: Height and width of the latents; `None` for the size of the model.
        make: A function that builds the denoiser instead of `name`, for a trial run.
    """

    def __init__(
        self, name: str, device: torch.device, size: int | None, make: Callable[[], nn.Module] | None = None
    ) -> None:
        self.device, self._size = device, None if size is None else (size, size)
        with torch.no_grad():
            self.full = (make or (lambda: build_denoiser(name)))().to(device).eval().requires_grad_(False)
        self._quantized: dict[str, nn.Module] = {}
        self._half: nn.Module | None = None

    def call(self, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
        """Returns the arguments of a step."""
        args, kwargs = example_call(self.full, batch_size=rows, seed=seed, size=self._size)
        cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        tree_map = torch.utils._pytree.tree_map
        return tree_map(cast, args), tree_map(cast, kwargs)

    @property
    def half(self) -> nn.Module:
        """Returns the denoiser in float16, channels last."""
        if self._half is None:
            model = nn.Module.to(copy.deepcopy(self.full), torch.float16)
            self._half = model.to(memory_format=torch.channels_last)
        return self._half

    def quantized(self, bits: str) -> nn.Module:
        """Returns the denoiser rounded to nearest, with a float32 rest."""
        if bits not in self._quantized:
            model = copy.deepcopy(self.full)
            quantize_to_nearest(model, RECIPE, BitWidth.parse(bits), [self.call(1)])
            self._quantized[bits] = model
        return self._quantized[bits]

    def compiled(self, bits: str, rows: int, dtype: torch.dtype, **options: Any) -> CudaDenoiser:
        """Returns the denoiser compiled by the CUDA engine."""
        engine_options = EngineOptions(device=self.device, rest_dtype=dtype)
        model = self.quantized(bits)
        result = CudaEngine(**options).compile(model, *self.call(rows), engine_options)
        assert isinstance(result, CudaDenoiser)
        return result


def record_calls(
    networks: Networks, bits: str, rows: int, dtype: torch.dtype, pack_weights: bool = False
) -> CallRecorder:
    """Records what one step launches, from shapes alone: nothing is computed, compiled, or put on the device."""
    meta = torch.device("meta")
    assembly = Assembly(Lowering(meta, dtype, pack_weights), prompt_cache=True)
    model, layers = assembly.build(networks.quantized(bits))
    options = EngineOptions(device=meta, rest_dtype=dtype)
    return _recorded(CudaDenoiser(model, layers, assembly.state, options, False), networks.call(rows, dtype))


def record_attention(networks: Networks, rows: int) -> CallRecorder:
    """Records what one step on the device launches, where attention is one operation."""
    compiled = networks.compiled("w8a8", rows, torch.float16, cuda_graphs=False)
    return _recorded(compiled, networks.call(rows, torch.float16))


def _recorded(compiled: CudaDenoiser, call: Call) -> CallRecorder:
    recorder = CallRecorder()
    compiled.call_eagerly(*call[0], **call[1])  # keys and values of the prompt are not part of a step
    with wrapped_products(compiled.model, recorder.named), recorder:
        compiled.call_eagerly(*call[0], **call[1])
    return recorder


def parity(networks: Networks, rows: int, bits: str) -> Iterator[dict[str, Any]]:
    """Compares the engine with exact integers and a float32 rest, and both precisions with full precision."""
    call = networks.call(rows, seed=1)
    half_call = networks.call(rows, torch.float16, seed=1)
    device = EngineOptions(device=networks.device)
    quantized = networks.quantized(bits)
    exact = ReferenceEngine().compile(quantized, *call, device)(*call[0], **call[1])[0]
    full = networks.full(*call[0], **call[1])[0]
    for dtype in (torch.float32, torch.float16):
        compiled = networks.compiled(bits, rows, dtype)
        output = compiled(*call[0], **call[1])[0]
        again = compiled(*call[0], **call[1])[0]
        eager = compiled.call_eagerly(*call[0], **call[1])[0]
        yield {
            "bits": bits,
            "rows": rows,
            "rest": str(dtype),
            "to_exact_integers": relative_l2(output, exact),
            "to_full_precision": relative_l2(output, full),
            "exact_integers_to_full_precision": relative_l2(exact, full),
            "float16_to_full_precision": relative_l2(networks.half(*half_call[0], **half_call[1])[0], full),
            "replay_repeats": bool(torch.equal(output, again)),
            "graph_equals_eager": bool(torch.equal(output, eager)),
            "layers": _coverage(compiled),
        }


def _coverage(compiled: CudaDenoiser) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for layer in compiled.layers:
        counts[f"{layer.kind} {layer.planned} -> {layer.precision}"] += 1
    return dict(counts)


def contenders(networks: Networks, rows: int, wants_compile: bool) -> dict[str, Callable[[], Any]]:
    """Returns a function per contender that runs one step; each is run once, so that nothing is compiled later."""
    ready: dict[str, Callable[[], Any]] = {}
    full_call, half_call = networks.call(rows), networks.call(rows, torch.float16)
    on_cuda = networks.device.type == "cuda"
    (sample, *others), named = half_call
    half_call = (sample.contiguous(memory_format=torch.channels_last), *others), named

    def add(name: str, function: Callable[..., Any], call: Call) -> None:
        def run() -> Any:
            return function(*call[0], **call[1])

        run()
        ready[name] = run

    no_grad = torch.no_grad()
    add("fp32 eager", no_grad(networks.full.__call__), full_call)
    add("fp16 channels_last eager", no_grad(networks.half.__call__), half_call)
    if on_cuda:
        add("fp16 in a CUDA graph", no_grad(GraphedFunction(networks.half)), half_call)
    if wants_compile:
        compiled = no_grad(torch.compile(networks.half, dynamic=False))
        add("fp16 compiled", compiled, half_call)
        if on_cuda:
            add("fp16 compiled in a CUDA graph", no_grad(GraphedFunction(compiled)), half_call)
    for bits, options in (
        ("w8a8", {}),
        ("w8a8", {"float_where_faster": False}),
        ("w8a8", {"prompt_cache": False}),
        ("w4a8", {}),
        ("w4a8", {"pack_weights": True}),
    ):
        name = " ".join([bits, *(f"{key}={value}" for key, value in options.items())])
        add(name, networks.compiled(bits, rows, torch.float16, **options), half_call)
    return ready


def times(ready: dict[str, Callable[[], Any]], rows: int, clock: Clock, rounds: int) -> Iterator[dict[str, Any]]:
    """Times a step of every contender, alternately."""
    spreads = {name: spread(values) for name, values in clock.in_turns(ready, rounds).items()}
    half = min((row["median_ms"] for name, row in spreads.items() if name.startswith("fp16")), default=float("nan"))
    full = spreads["fp32 eager"]["median_ms"]
    for name, row in spreads.items():
        ratios = {"over_fp32": full / row["median_ms"], "over_best_fp16": half / row["median_ms"]}
        yield {"contender": name, "rows": rows, **row, **ratios}


def attention_times(
    attentions: dict[tuple[TensorLike, ...], int], device: torch.device, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Times attention of every shape by each of torch's implementations, on the strided operands of a step."""
    on_cuda = device.type == "cuda"
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if on_cuda else ("MATH",)
    for shapes, count in attentions.items():
        generator = torch.Generator(device).manual_seed(0)
        sets = [
            [shape.random(generator) for shape in shapes] for _ in range(clock.sets(sum(s.num_bytes for s in shapes)))
        ]
        row: dict[str, Any] = {"query": shapes[0].shape, "key": shapes[1].shape, "count": count}
        for name in names:
            with sdpa_kernel(getattr(SDPBackend, name)):
                try:
                    row[name] = clock.launch_us([_attention(*operands) for operands in sets])
                except RuntimeError as error:
                    row[name] = str(error).splitlines()[0][:120]
        yield row


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    return lambda: scaled_dot_product_attention(q, k, v)


def memory(networks: Networks, rows: int) -> Iterator[dict[str, Any]]:
    """Measures the bytes of the weights of each form, and the peak of a step without graphs beyond them."""
    if networks.device.type != "cuda":
        return
    call, half_call = networks.call(rows), networks.call(rows, torch.float16)
    forms: dict[str, tuple[Callable[[], Any], Call]] = {
        "fp32": (lambda: copy.deepcopy(networks.full), call),
        "fp16": (lambda: copy.deepcopy(networks.half), half_call),
        "w8a8": (lambda: networks.compiled("w8a8", rows, torch.float16, cuda_graphs=False), half_call),
        "w4a8 packed": (
            lambda: networks.compiled("w4a8", rows, torch.float16, cuda_graphs=False, pack_weights=True),
            half_call,
        ),
    }
    for name, (make, arguments) in forms.items():
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model = make()
        weights = torch.cuda.memory_allocated() - before
        with torch.no_grad():
            model(*arguments[0], **arguments[1])
            torch.cuda.reset_peak_memory_stats()
            model(*arguments[0], **arguments[1])
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        yield {"form": name, "rows": rows, "weights_mb": weights / 1e6, "peak_mb": peak / 1e6}
        del model


def kernel_table(step: Callable[[], Any], device: torch.device, top: int = 45) -> dict[str, Any]:
    """Returns the number and the microseconds of the kernels of one step by name.

    On CUDA these are the kernels of a graph's replay, on a CPU torch's operations. A kernel may start before the
    previous kernel ends and wait for it, so its time is counted from the end of the previous kernel to its end; the sum
    is the time of the step.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    rows: dict[str, list[float]] = defaultdict(list)
    sequence: list[tuple[str, float]] = []
    if on_cuda:
        launched = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launched.sort(key=lambda e: e.time_range.end)
        ends = [launched[0].time_range.start, *(e.time_range.end for e in launched)] if launched else []
        for event, before in zip(launched, ends, strict=False):
            sequence.append((event.name[:40], round(event.time_range.end - before, 2)))
            rows[event.name].append(event.time_range.end - before)
    else:
        for event in profiler.events():
            rows[event.name].append(event.self_cpu_time_total)
    ordered = sorted(rows.items(), key=lambda item: -sum(item[1]))
    return {
        "kernels": sum(map(len, rows.values())),
        "kernel_ms": sum(map(sum, rows.values())) / 1e3,
        "by_name": [
            {"name": name[:110], "count": len(v), "us": round(sum(v), 1), "us_each": round(sum(v) / len(v), 2)}
            for name, v in ordered[:top]
        ],
        "sequence": sequence,
    }
