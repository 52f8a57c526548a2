"""Times INT8 beside 16-bit floating point on one GPU: whole denoisers of real sizes with random weights.

    python benchmarks/gpu_models.py --out results.jsonl
    python benchmarks/gpu_models.py --models sdxl,sd15,sd15:16,sd15:loaded --at-once 4
    python benchmarks/gpu_models.py --smoke

A case is a model, with a number of rows after a colon if it is not the usual one, and options after further colons:
`loaded` if the denoiser that `from_pretrained` returns is to be compiled and timed in place of the CUDA engine, `lora`
if it is to be timed with LoRA adapters as well (`pip install peft`), `cache` if both sides are to be timed with
diffusers' first-block cache as well, `stages` if the CUDA engine is to be timed without some of its fusions, and with
other kernels, as well.

torch compiles both sides (repeated blocks once each) and replays them as CUDA graphs, alternately, in one process per
case; medians are printed. Several cases can be compiled at once: while one is timed, the others are stopped. With
`--sign` they can be compiled beside other work on the GPU, and are timed when that is over. The denoiser is created on
the device in its element type and rounded to nearest there. `--smoke` runs every path with tiny networks on a CPU; its
times mean nothing. Each line of the output is JSON. Cases with a result in `--out` are skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import ModelMixin
from gpu.processes import COMPILED, add_line, measure, unfinished
from gpu.timing import Clock, spread
from gpu.variants import ADAPTERS, adapted, cached, shared_copy, staged
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from edadm_cli.calibrate.planning import plan_network
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.compiled.plain import (
    compile_blocks,
    has_fused_blocks,
    many_shapes,
    placed_copy,
    repeated_blocks,
)
from edadm_cli.engines.parity import relative_l2
from edadm_cli.integrations.deployment import make_ready
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_denoiser
from edadm_cli.models.units import trace
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.network import deploy, set_module
from edadm_cli.recipe import RangeRecipe, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]
RECIPE = Recipe(name="extremes", ranges=RangeRecipe(weight="minmax", activation="minmax", channel_parts=False))
# Model -> rows, changes to its configuration; the most important first, as a session may end before the last one.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "dit-xl-2": (2, {}),
    "pixart-sigma": (2, {}),
    "flux-schnell": (1, {}),
    "sd3.5-medium": (2, {}),
    "sd15": (2, {}),
    "sdxl": (2, {}),
}
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """What is timed in one process.

    Args:
        model: The name of the model.
        rows: Rows of the batch; `None` for those of the table in this file.
        loaded: Whether the compiled model that `from_pretrained` would load is timed and not the CUDA engine.
        lora: Whether INT8 is timed with LoRA adapters too.
        cache: Whether both sides are timed with a step cache too.
        stages: Whether the CUDA engine is timed without some of its fusions too.
    """

    model: str
    rows: int | None = None
    loaded: bool = False
    lora: bool = False
    cache: bool = False
    stages: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """Returns the case of `MODEL[:ROWS][:loaded][:lora][:cache][:stages]`."""
        model, *parts = text.split(":")
        rows = next((int(part) for part in parts if part.isdigit()), None)
        return cls(model, rows, *(word in parts for word in ("loaded", "lora", "cache", "stages")))


@torch.no_grad()
def quantize(model: nn.Module, call: Call) -> int:
    """Rounds a model to W8A8 in place and on its device, with ranges from one call; returns the number of layers."""
    plan = plan_network(trace(model, *call), RECIPE, BitWidth.parse("w8a8"))
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            extremes[name] = (inputs[0].amin().float(), inputs[0].amax().float())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(observe(name)) for name in plan.layers]
    model(*call[0], **call[1])
    for handle in handles:
        handle.remove()
    for name, layer_plan in plan.layers.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight").float()
        scale = weight.flatten(1).abs().amax(dim=1).clamp_min(1e-8) / 127
        codes = (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
        low, high = (value.clamp(max=0) if i == 0 else value.clamp(min=0) for i, value in enumerate(extremes[name]))
        step = ((high - low) / 255).clamp_min(1e-8)
        quantized = quantized_layer(layer, layer_plan)
        assert isinstance(quantized, QuantizedLayer)
        quantized.set_parameters(codes, scale, step, (-low / step).round().int())
        quantized.keeps_float_weight = False  # PEFT reads the weight of every layer that it adapts
        set_module(model, name, quantized)
    return len(plan.layers)


class Model:
    """Builds and times the contenders of one model.

    Args:
        options: The options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.dtype = torch.float32 if options.smoke else getattr(torch, options.dtype)
        self.clock = Clock(self.device)
        self.case, self.kernels, self.attention = options.case, options.kernels, options.attention
        name, (rows, changes) = self.case.model, MODELS.get(self.case.model, (2, {}))
        self.rows = self.case.rows or rows
        if options.smoke:
            self.full, self.call = tiny_families().tiny_denoiser(name, self.rows)
        else:
            self.full = build_denoiser(name, dtype=self.dtype, device=self.device, changes=changes)
            self.call = example_call(self.full, batch_size=self.rows)

    def run(self, wait: Callable[[], None]) -> dict[str, Any]:
        """Compiles both sides, compares them, and times them alternately.

        Args:
            wait: A function that is called when everything is compiled, and returns when the GPU is free.
        """
        started = time.monotonic()
        quantized = copy.deepcopy(self.full)
        layers = quantize(quantized, self.call)
        contenders = self._contenders(quantized)
        outputs, seconds = {}, {"build": round(time.monotonic() - started, 1)}
        for name, function in contenders.items():
            began = time.monotonic()
            outputs[name] = prediction_of(function(*self.call[0], **self.call[1])).float()
            seconds[name] = round(time.monotonic() - began, 1)
        calls = {name: partial(f, *self.call[0], **self.call[1]) for name, f in contenders.items()}
        wait()
        times = {name: spread(values) for name, values in self.clock.in_turns(calls, ROUNDS).items()}
        median = times["float"]["median_ms"]
        others = [name for name in contenders if name != "float"]
        row = {
            "quantized_layers": layers,
            "seconds": seconds,
            "times": times,
            "speedup": {name: round(median / times[name]["median_ms"], 3) for name in others},
            "to_float": {name: round(relative_l2(outputs[name], outputs["float"]), 4) for name in others},
            "weights_mib": {"float": mib(self.full), "int8": mib(quantized)},
        }
        if self.kernels:
            row["kernels"] = {name: kernel_times(call, self.kernels) for name, call in calls.items()}
        return row

    def _contenders(self, quantized: nn.Module) -> dict[str, Callable[..., Any]]:
        """Returns the functions that are timed, by name, in the order in which they are compiled.

        With a loaded export, floating point comes last: another process may have compiled it by then.
        """
        graphed = GraphedFunction if self.device.type == "cuda" else lambda function: function
        self._prepare_convolutions(self.full)
        if self.device.type == "cuda":
            compile_blocks(self.full)
        full = graphed(in_many_shapes(self.full))
        if self.case.loaded:
            name, run = "int8 from_pretrained, compiled", lambda model: graphed(in_many_shapes(self._loaded(model)))
        else:
            options = EngineOptions(device=self.device, rest_dtype=self.dtype, attention=self.attention)
            args, kwargs = self.call
            name, run = "int8 engine", lambda model: CudaEngine().compile(model, args, kwargs, options)
        contenders: dict[str, Callable[..., Any]] = {name: run(quantized)}
        if self.case.stages:
            contenders |= staged(name, lambda: run(quantized), self.call, has_fused_blocks(self.full))
        if self.case.lora:
            for adapter, (rank, ends) in ADAPTERS.items():
                contenders[f"{name}, {adapter}"] = run(adapted(quantized, rank, ends, self.dtype))
        if self.case.cache:
            contenders |= cached(name, quantized, run(quantized), self.device)
            copied = shared_copy(self.full)
            if self.device.type == "cuda":
                compile_blocks(copied)
            contenders |= cached("float", copied, graphed(copied), self.device)
        return {**contenders, "float": full} if self.case.loaded else {"float": full, **contenders}

    def _loaded(self, quantized: nn.Module) -> nn.Module:
        """Returns the model as `from_pretrained` loads it and `to` moves it, compiled as docs/gpu.md says."""
        loaded = placed_copy(quantized, self.device, self.dtype)
        if self.device.type != "cuda":
            deploy(loaded, KernelProduct((self.device.type,)))
            return loaded
        make_ready(loaded)
        blocks = repeated_blocks(loaded)
        if blocks and isinstance(loaded, ModelMixin) and getattr(loaded, "_repeated_blocks", None):
            loaded.compile_repeated_blocks(fullgraph=True)
            return loaded
        for part in blocks or [loaded]:  # diffusers lists no blocks of DiT, PixArt and Stable Diffusion 3
            part.compile()
        return loaded

    @staticmethod
    def _prepare_convolutions(model: nn.Module) -> None:
        """Stores the weights of a model with convolutions channels last."""
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            nn.Module.to(model, memory_format=torch.channels_last)


def in_many_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that torch may compile again for as many sizes as a model has."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with many_shapes():
            return function(*args, **kwargs)

    return run


def tiny_families() -> ModuleType:
    """Returns the tests' builders of tiny denoisers of each family."""
    path = Path(__file__).parents[1] / "tests" / "denoisers" / "families.py"
    spec = spec_from_file_location("tiny_families", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mib(model: nn.Module) -> float:
    """Returns the size of a model's parameters and buffers in MiB."""
    tensors = (*model.parameters(), *model.buffers())
    return round(sum(tensor.nbytes for tensor in tensors) / 2**20, 1)


def kernel_times(call: Callable[[], Any], most: int) -> list[tuple[str, float, int]]:
    """Returns the kernels of a call that take most time: name, microseconds of all launches, and launches."""
    repeats = 3
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA"):
            sums[event.name[:110]].append(event.time_range.elapsed_us())
    rows = [(name, round(sum(us) / repeats, 1), len(us) // repeats) for name, us in sums.items()]
    return sorted(rows, key=lambda row: -row[1])[:most]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of all cases that change a result."""
    return {"dtype": options.dtype, "attention": options.attention}


@torch.no_grad()
def child(options: argparse.Namespace) -> None:
    """Measures one case: prints `COMPILED`, waits for a line of input, and prints the result."""
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    row: dict[str, Any] = {"model": options.case.model, **settings_of(options)}
    if not options.smoke:
        row["device"] = torch.cuda.get_device_name()
    model = Model(options)
    row["rows"] = model.rows
    row["built_seconds"] = round(time.monotonic() - started, 1)

    def wait() -> None:
        print(COMPILED, flush=True)
        sys.stdin.readline()

    row |= model.run(wait)
    if not options.smoke:
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print(json.dumps(row), flush=True)


def main() -> None:
    """Measures the cases, each in a separate process, within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="cases MODEL[:ROWS][:loaded], with commas; all models by default")
    parser.add_argument("--case", type=Case.parse, help=argparse.SUPPRESS)
    parser.add_argument(
        "--attention", default="float", choices=("float", "int8"), help="form of the engine's attention"
    )
    parser.add_argument("--dtype", default="float16", help="element type of both sides' floating point")
    parser.add_argument("--at-once", type=int, default=1, help="cases that are compiled at the same time")
    parser.add_argument("--kernels", type=int, default=0, help="kernels that are listed with their times")
    parser.add_argument("--out", type=Path, help="file that every line is appended to")
    parser.add_argument("--seconds", type=float, default=340, help="time limit of all cases together")
    parser.add_argument("--cap", type=float, default=120, help="time limit of compiling one case in seconds")
    parser.add_argument("--sign", type=Path, help="compiled cases are timed only once this file exists")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.case:
        child(options)
        return
    known = tiny_families().FAMILIES if options.smoke else MODELS
    command = [sys.executable, __file__, "--dtype", options.dtype, "--attention", options.attention]
    command += ["--kernels", str(options.kernels), *(["--smoke"] if options.smoke else []), "--case"]
    cases = options.models.split(",") if options.models else list(known)
    cases = unfinished(cases, options.out, settings_of(options))
    for line in measure(cases, command, options.at_once, options.cap, options.seconds, options.sign):
        add_line(line, options.out)


if __name__ == "__main__":
    main()
