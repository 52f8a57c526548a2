"""Times a PixArt in OpenVINO with and without the tokens of a prompt that its mask hides.

    python benchmarks/cpu_hidden_tokens.py --size 64 --tokens 20

The prompt is padded to 300 tokens. The engine leaves out padding that a mask of zeros and ones hides. With the same
mask as a bias, which attention adds to its scores, it leaves out nothing. Both run in turns on one thread, and
times are the processor time of this process, which other programs hardly change. Weights are rounded to nearest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.engines.parity import relative_l2
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_denoiser
from edadm_cli.recipe import AttentionRecipe, RangeRecipe, Recipe

MASK = "encoder_attention_mask"


def main() -> None:
    """Prints the milliseconds of both, their ratio, and how far their predictions are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pixart-sigma-random")
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of the prompt that the mask shows")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    denoiser = build_denoiser(options.model).requires_grad_(False)
    args, kwargs = example_call(denoiser, batch_size=1, size=(options.size, options.size))
    mask = torch.zeros_like(kwargs[MASK])
    mask[:, : options.tokens] = 1
    calls: dict[str, dict[str, Any]] = {
        "all tokens": kwargs | {MASK: (1 - mask[:, None]) * -10000.0},
        "without hidden tokens": kwargs | {MASK: mask},
    }
    attention, ranges = AttentionRecipe(quantize=True), RangeRecipe(weight="minmax", activation="minmax")
    recipe = Recipe(name="nearest", ranges=ranges, attention=attention)
    quantize_to_nearest(denoiser, recipe, BitWidth.parse("w8a8"), [(args, kwargs)])
    engine, on_cpu = OpenVinoEngine(), EngineOptions(torch.device("cpu"), torch.bfloat16, num_threads=1)
    compiled = {name: engine.compile(denoiser, args, call, on_cpu) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    predictions = {}
    for turn in range(options.turns + 1):
        for name, call in calls.items():
            start = time.process_time()
            predictions[name] = compiled[name](*args, **call).sample
            if turn:  # the first call computes what depends on the prompt
                seconds[name].append(time.process_time() - start)
    for name, times in seconds.items():
        print(f"{name:22} {statistics.median(times) * 1e3:8.0f} ms, shortest {min(times) * 1e3:.0f}")
    whole, fewer = (statistics.median(times) for times in seconds.values())
    print(f"{whole / fewer:.3f} times as fast; predictions differ by {relative_l2(*predictions.values()):.1e}")


if __name__ == "__main__":
    main()
