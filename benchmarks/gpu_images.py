"""Times whole images of Stable Diffusion XL with random weights on one GPU: INT8 beside compiled float16.

    python benchmarks/gpu_images.py --out images.jsonl
    python benchmarks/gpu_images.py --cases int8:1+8,float16:1 --at-once 2
    python benchmarks/gpu_images.py --smoke

An image is what the pipeline returns for a prompt: 1024x1024 pixels, 20 Euler steps, guidance, with both text encoders
and the decoder, as in MLPerf's text-to-image benchmark. A case is a contender and its batches. INT8 is the CUDA engine
with weights rounded to nearest; float16 is compiled by torch and replayed as a CUDA graph. Decoder and text encoders
run in float16 in both. Several cases can be compiled at once: while one is timed, the others are stopped. `--smoke`
runs every path with tiny networks on a CPU. Each line of the output is JSON. Cases with a result in `--out` are
skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from gpu.processes import COMPILED, add_line, measure, unfinished
from gpu.variants import shared_copy
from gpu_models import mib, quantize
from torch import nn

from edadm_cli.bench.pipeline import TimedDenoiser
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.models.architecture import Architecture, load_architecture
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_random_pipeline

CASES = ("int8:1+8", "float16:1", "float16:8")
STEPS, GUIDANCE, PROMPT = 20, 8.0, "a cat on a mat"
SMOKE_CASES, SMOKE_STEPS = ("int8:1+2", "float16:1"), 2
_WIDTH = 32  # of the text encoders of `--smoke`
_TEXT = {"hidden_size": _WIDTH, "projection_dim": _WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
_SMOKE: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 1),
        "sample_size": 16,
        "cross_attention_dim": 2 * _WIDTH,
        "projection_class_embeddings_input_dim": 6 * 256 + _WIDTH,  # six sizes and the pooled states of the text
    },
    "text_encoder": {**_TEXT, "num_attention_heads": 2},
    "text_encoder_2": {**_TEXT, "num_attention_heads": 2},
    "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 128},
}
"""The fields of the components' configurations that `--smoke` changes."""
_EMBEDDING = 0.02  # the random embeddings of text encoders are scaled down, or float16 overflows in their norms


class Images:
    """The pipeline and the function that runs its denoiser.

    Args:
        contender: `int8` or `float16`.
        smoke: Whether a tiny pipeline runs on the CPU.
    """

    def __init__(self, contender: str, smoke: bool) -> None:
        self.smoke, self.device = smoke, torch.device("cpu" if smoke else "cuda")
        self.dtype = torch.float32 if smoke else torch.float16
        self.pipeline = self._pipeline()
        unet = self.pipeline.unet
        shell = shared_copy(unet)  # its configuration is read by the pipeline
        self.weights_mib = {"float": mib(unet)}
        if contender == "int8":
            call = example_call(unet, batch_size=2)
            quantize(unet, call)
            self.weights_mib["int8"] = mib(unet)
            function: Callable[..., Any] = CudaEngine().compile(unet, *call, EngineOptions(self.device, self.dtype))
        elif smoke:
            function = unet
        else:
            torch.backends.cudnn.benchmark = True
            nn.Module.to(unet, memory_format=torch.channels_last)
            function = GraphedFunction(torch.compile(unet, dynamic=False))
        self.timed = TimedDenoiser(function, self.device)
        self.pipeline.unet = EngineDenoiser(shell, self.timed)

    def once(self, batch: int, steps: int) -> float:
        """Generates a batch and returns its seconds."""
        self._wait()
        self.timed.seconds, started = 0.0, time.perf_counter()
        images = self.pipeline(
            [PROMPT] * batch,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        self._wait()
        seconds = time.perf_counter() - started
        assert bool(images.isfinite().all())
        return seconds

    def row(self, batch: int, steps: int) -> dict[str, Any]:
        """Times a batch several times and returns its row."""
        self.once(batch, 2)
        seconds = [self.once(batch, steps) for _ in range(5 if batch == 1 else 3)]
        median = statistics.median(seconds)
        return {
            "batch": batch,
            "steps": steps,
            "seconds": seconds,
            "images_per_second": batch / median,
            "denoiser_seconds": self.timed.seconds,
            "peak_mib": None if self.smoke else round(torch.cuda.max_memory_allocated() / 2**20),
        }

    def _pipeline(self) -> Any:
        architecture = _smaller(load_architecture("sdxl")) if self.smoke else load_architecture("sdxl")
        pipeline: Any = build_random_pipeline(architecture, 0, self.dtype, self.device)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            for module in encoder.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.data.mul_(_EMBEDDING)
        pipeline.vae.register_to_config(force_upcast=False)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _smaller(architecture: Architecture) -> Architecture:
    """Returns the architecture of the tiny pipeline that `--smoke` runs."""
    components = {
        name: (kind, {**config, **_SMOKE.get(name, {})}) for name, (kind, config) in architecture.components.items()
    }
    return architecture.model_copy(update={"components": components})


@torch.no_grad()
def child(options: argparse.Namespace) -> None:
    """Measures one case: prints `COMPILED`, waits for a line of input, and prints the result."""
    contender, _, batches = options.case.partition(":")
    images, sizes = Images(contender, options.smoke), [int(text) for text in batches.split("+")]
    for batch in sizes:
        images.once(batch, 2)
    print(COMPILED, flush=True)
    sys.stdin.readline()
    rows = [images.row(batch, options.steps) for batch in sizes]
    device = "cpu" if options.smoke else torch.cuda.get_device_name()
    result = {"contender": contender, "device": device, "steps": options.steps, "weights_mib": images.weights_mib}
    print(json.dumps({**result, "rows": rows}))


def main() -> None:
    """Measures the cases, each in a separate process, within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"cases CONTENDER:BATCH[+BATCH...], with commas; {','.join(CASES)} by default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=f"Euler steps of an image; {STEPS} by default")
    parser.add_argument("--at-once", type=int, default=1, help="cases that are compiled at the same time")
    parser.add_argument("--out", type=Path, help="file that every line is appended to")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of all cases together")
    parser.add_argument("--cap", type=float, default=300, help="time limit of compiling one case in seconds")
    parser.add_argument("--smoke", action="store_true", help="run every path with tiny networks on a CPU")
    options = parser.parse_args()
    options.steps = options.steps or (SMOKE_STEPS if options.smoke else STEPS)
    if options.case:
        child(options)
        return
    command = [
        sys.executable,
        __file__,
        "--steps",
        str(options.steps),
        *(["--smoke"] if options.smoke else []),
        "--case",
    ]
    cases = options.cases.split(",") if options.cases else SMOKE_CASES if options.smoke else CASES
    waiting = unfinished(list(cases), options.out, {"steps": options.steps})
    for line in measure(waiting, command, options.at_once, options.cap, options.seconds):
        add_line(line, options.out)


if __name__ == "__main__":
    main()
