"""INT8 against 16-bit floating point on one GPU, whole denoisers with random weights at their real sizes.

    python benchmarks/gpu_models.py --out results.jsonl
    python benchmarks/gpu_models.py --models dit-xl-2 --rows 64
    python benchmarks/gpu_models.py --smoke

Both sides are compiled by torch (repeated blocks once each) and replayed as a CUDA graph, in turns, in one process per
model; medians are printed. The denoiser is built on the device in its element type and rounded to nearest there.
`--smoke` runs every path with tiny networks on a CPU; its times say nothing. Each line of the output is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from gpu.timing import Clock, spread
from torch import Tensor, nn

from edadm_cli.calibrate.planning import plan_network
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.cuda.layer_product import KernelProduct
from edadm_cli.engines.cuda.plain import compile_blocks, many_shapes, placed_copy, repeated_blocks
from edadm_cli.engines.parity import prediction_of, relative_l2
from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.units import trace
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.network import deploy, set_module
from edadm_cli.recipe import RangeRecipe, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]
RECIPE = Recipe(name="extremes", ranges=RangeRecipe(weight="minmax", activation="minmax", channel_parts=False))
# In the order of their value, where a session ends before the last: model, rows, changes to its configuration.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "dit-xl-2": (2, {}),
    "pixart-sigma": (2, {}),
    "flux-schnell": (1, {}),
    "sd3.5-medium": (2, {}),
    "sd15": (2, {}),
    "sdxl": (2, {}),
}
ROUNDS = 7


@torch.no_grad()
def build(name: str, device: torch.device, dtype: torch.dtype, changes: dict[str, Any]) -> nn.Module:
    """A denoiser with random weights, made on the device in its element type.

    Matrices have standard deviation 1 / sqrt(fan-in) and vectors lie around one for norms and zero elsewhere, so that
    activations keep their scale through the network.
    """
    architecture = load_architecture(name)
    cls = architecture.component_class(architecture.denoiser_name)
    config = {**architecture.config(architecture.denoiser_name), **changes}
    with torch.device("meta"):
        shapes = cls(**config)
    buffers = any(True for _ in shapes.buffers())
    model: nn.Module = shapes.to(dtype).to_empty(device=device)
    if buffers:  # positions are computed where a model is built
        small = cls(**{**config, **{key: 1 for key in ("num_layers", "num_single_layers") if key in config}})
        for key, buffer in small.named_buffers():
            owner, _, own = key.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for owner in model.modules():
        for own, parameter in owner.named_parameters(recurse=False):
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.mul_(1.0 if isinstance(owner, nn.Embedding) else parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.1).add_(1.0 if own == "weight" and "norm" in type(owner).__name__.lower() else 0.0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantize(model: nn.Module, call: Call) -> int:
    """Round a model to W8A8 in place and on its device, ranges from one call; returns how many layers there are."""
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
        set_module(model, name, quantized)
    return len(plan.layers)


class Model:
    """The contenders of one model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.dtype = torch.float32 if options.smoke else getattr(torch, options.dtype)
        self.clock = Clock(self.device)
        name, (rows, changes) = options.model, MODELS.get(options.model, (2, {}))
        self.rows, self.attention = options.rows or rows, options.attention
        if options.smoke:
            self.full, self.call = tiny_families().tiny_denoiser(name, self.rows)
        else:
            self.full = build(name, self.device, self.dtype, changes)
            self.call = example_call(self.full, batch_size=self.rows)

    def run(self, plain: bool) -> dict[str, Any]:
        """Both sides compiled, compared, and timed in turns."""
        started = time.monotonic()
        graphed = GraphedFunction if self.device.type == "cuda" else lambda function: function
        quantized = copy.deepcopy(self.full)
        layers = quantize(quantized, self.call)
        if any(isinstance(module, nn.Conv2d) for module in self.full.modules()):
            nn.Module.to(self.full, memory_format=torch.channels_last)
        floating = self.full
        if self.device.type == "cuda":
            compile_blocks(floating)

        contenders: dict[str, Callable[..., Any]] = {"float": graphed(in_many_shapes(floating))}
        options = EngineOptions(device=self.device, rest_dtype=self.dtype, attention=self.attention)
        engine = CudaEngine(float_where_faster=False)
        contenders["int8 engine"] = engine.compile(quantized, *self.call, options)
        if plain:
            loaded = placed_copy(quantized, self.device, self.dtype)
            deploy(loaded, KernelProduct((self.device.type,)))
            if any(isinstance(module, nn.Conv2d) for module in loaded.modules()):
                nn.Module.to(loaded, memory_format=torch.channels_last)
            if self.device.type == "cuda":
                if hasattr(loaded, "compile_repeated_blocks") and repeated_blocks(loaded):
                    loaded.compile_repeated_blocks(fullgraph=True, dynamic=False)  # as docs/gpu.md says
                else:
                    loaded.compile(fullgraph=True, dynamic=False)
            contenders["int8 from_pretrained, compiled"] = graphed(in_many_shapes(loaded))
        outputs, seconds = {}, {"build": round(time.monotonic() - started, 1)}
        for name, function in contenders.items():
            began = time.monotonic()
            outputs[name] = prediction_of(function(*self.call[0], **self.call[1])).float()
            seconds[name] = round(time.monotonic() - began, 1)
        calls = {name: lambda function=f: function(*self.call[0], **self.call[1]) for name, f in contenders.items()}
        times = {name: spread(values) for name, values in self.clock.in_turns(calls, ROUNDS).items()}
        best = times["float"]["median_ms"]
        return {
            "quantized_layers": layers,
            "seconds": seconds,
            "times": times,
            "speedup": {name: round(best / row["median_ms"], 3) for name, row in times.items() if name != "float"},
            "to_float": {
                name: round(relative_l2(found, outputs["float"]), 4)
                for name, found in outputs.items()
                if name != "float"
            },
            "weights_mib": {"float": mib(self.full), "int8": mib(quantized)},
        }


def in_many_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that torch may compile anew for as many sizes as a model has."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with many_shapes():
            return function(*args, **kwargs)

    return run


def tiny_families() -> Any:
    """The tests' tiny denoisers of each family."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    return import_module("tiny_denoisers")


def mib(model: nn.Module) -> float:
    """Size of a model's parameters and buffers in MiB."""
    tensors = (*model.parameters(), *model.buffers())
    return round(sum(tensor.nbytes for tensor in tensors) / 2**20, 1)


@torch.no_grad()
def child(options: argparse.Namespace) -> None:
    """Measure one model and print one line."""
    started = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    row: dict[str, Any] = {"model": options.model, "dtype": options.dtype}
    if not options.smoke:
        row["device"] = torch.cuda.get_device_name()
    model = Model(options)
    row["rows"] = model.rows
    row["built_seconds"] = round(time.monotonic() - started, 1)
    row |= model.run(bool(options.plain))
    if not options.smoke:
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print(json.dumps(row), flush=True)


def main() -> None:
    """Measure each model in a process of its own, in order, within the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="architectures, with commas; all by default")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help="rows of the batch; each model's own by default")
    parser.add_argument(
        "--attention", default="float", choices=("float", "int8"), help="form of the engine's attention"
    )
    parser.add_argument("--dtype", default="float16", help="of both sides' floating point")
    parser.add_argument("--plain", help="models of which the compiled loaded export is timed too", default="")
    parser.add_argument("--out", type=Path, help="file that every line is appended to")
    parser.add_argument("--seconds", type=float, default=340, help="of all models together")
    parser.add_argument("--cap", type=float, default=120, help="seconds of one model")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.model:
        child(options)
        return
    known = tiny_families().FAMILIES if options.smoke else MODELS
    names = options.models.split(",") if options.models else list(known)
    started = time.monotonic()
    for name in names:
        left = min(options.cap, options.seconds - (time.monotonic() - started))
        line = measured(name, options, left) if left > 20 else json.dumps({"model": name, "skipped": "no time left"})
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measured(name: str, options: argparse.Namespace, seconds: float) -> str:
    """The line of one model, or what kept it from having one."""
    command = [sys.executable, __file__, "--model", name, "--dtype", options.dtype]
    command += ["--rows", str(options.rows)] if options.rows else []
    command += ["--attention", options.attention]
    command += ["--smoke"] if options.smoke else []
    command += ["--plain", name] if name in options.plain.split(",") else []
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return json.dumps({"model": name, "stopped": f"after {seconds:.0f} s"})
    if process.returncode:
        return json.dumps({"model": name, "error": process.stderr[-1500:]})
    return process.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
