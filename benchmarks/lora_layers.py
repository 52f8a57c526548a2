"""Times single quantized linear layers with a LoRA adapter, by rank, at the widths of SDXL and FLUX on one GPU.

    python benchmarks/lora_layers.py --out layers.jsonl
    python benchmarks/lora_layers.py --smoke

A row has the microseconds of one layer: the float16 product of cuBLAS; the INT8 product of the CUDA engine, which
quantizes its input, without an adapter and with ranks 4, 16 and 64; and the same of a layer that torch compiles, with
what PEFT computes beside it. Inputs are not in the GPU's cache. `--smoke` runs every path with a small layer on a CPU.
Each line of the output is JSON. Sizes with a line in `--out` are skipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.processes import add_line, unfinished
from gpu.timing import Clock
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.engines.adapters import SideBranch
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.compiled.plain import many_shapes
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.network import deploy
from edadm_cli.quant.plan import LayerPlan

Launch = Callable[[Tensor], Any]
RANKS = (4, 16, 64)
SHAPES = {  # name -> rows, inputs, outputs
    "SDXL, 640 channels, 2 x 4,096 tokens": (8192, 640, 640),
    "SDXL, 1,280 channels, 2 x 1,024 tokens": (2048, 1280, 1280),
    "FLUX, 3,072 channels, 4,608 tokens": (4608, 3072, 3072),
    "FLUX, 3,072 to 12,288 channels": (4608, 3072, 12288),
}
_NAME = "layer"


class Holder(nn.Module):
    """A model of one layer, and what PEFT computes beside it if there is an adapter."""

    def __init__(self, layer: nn.Module, adapter: nn.Sequential | None) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs for inputs `[M, K]`."""
        y: Tensor = self.layer(x)
        return y if self.adapter is None else y + self.adapter(x)


def launches(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Launch]:
    """Returns what is timed at one size, by name."""
    _, inputs, outputs = shape
    linear = nn.Linear(inputs, outputs).to(device, dtype)
    layer = quantized_layer(linear, LayerPlan(weight_bits=8, activation_bits=8)).to(device)
    assert isinstance(layer, QuantizedLayer)
    codes = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    zero_point = torch.tensor(128, device=device)
    scales = torch.full((outputs,), 1e-3, device=device), torch.tensor(0.03, device=device)
    layer.set_parameters(codes, *scales, zero_point)
    result: dict[str, Launch] = {"float16": lambda x: F.linear(x, linear.weight, linear.bias)}
    result["engine"] = Lowering(device, dtype).product(_NAME, layer)
    for rank in RANKS:
        branch = SideBranch(torch.randn(rank, inputs), torch.randn(outputs, rank), [(_NAME, "a", rank)])
        branch.set_strengths({(_NAME, "a"): 0.01})
        result[f"engine, rank {rank}"] = Lowering(device, dtype, adapters={_NAME: branch}).product(_NAME, layer)
    result["compiled"] = _compiled(layer, None, device, dtype)
    return result | {f"compiled, rank {rank}": _compiled(layer, rank, device, dtype) for rank in RANKS}


def _compiled(layer: QuantizedLayer, rank: int | None, device: torch.device, dtype: torch.dtype) -> Launch:
    adapter = None
    if rank is not None:
        outputs, inputs = layer.weight_shape
        parts = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        adapter = nn.Sequential(*parts).to(device, dtype)
    holder = Holder(layer, adapter)
    deploy(holder, KernelProduct((device.type,)))
    return torch.compile(holder, fullgraph=True, dynamic=False) if device.type == "cuda" else holder


@torch.no_grad()
def main() -> None:
    """Times every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that every line is appended to")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    dtype = torch.float32 if options.smoke else torch.float16
    clock = Clock(device)
    shapes = {"smoke": (32, 64, 64)} if options.smoke else SHAPES
    for name in unfinished(list(shapes), options.out, {}):
        shape = rows, inputs, outputs = shapes[name]
        xs = [
            torch.randn(rows, inputs, device=device, dtype=dtype)
            for _ in range(clock.sets(2 * rows * inputs + inputs * outputs))
        ]
        times = {}
        for key, launch in launches(shape, device, dtype).items():
            with many_shapes():
                launch(xs[0])
                times[key] = round(clock.launch_us([partial(launch, x) for x in xs]), 2)
        row = {"case": name, "rows": rows, "inputs": inputs, "outputs": outputs, "us": times}
        add_line(json.dumps(row), options.out)


if __name__ == "__main__":
    main()
