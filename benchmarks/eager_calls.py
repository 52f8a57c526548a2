"""Times one call of a denoiser in eager torch on a GPU: float16, and the export that `from_pretrained` loads, at W8A8.

    python benchmarks/eager_calls.py sd15 sdxl
    python benchmarks/eager_calls.py --smoke unet

For each model it prints the median milliseconds of a call with two rows until the GPU is ready, and of these the
milliseconds until Python has launched all kernels. Weights are random and rounded to nearest. `--smoke` runs a tiny
network on a CPU, where the operations compute their references and the times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from gpu_models import quantize, tiny_families

from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_denoiser
from edadm_cli.quant.network import deploy

CALLS, ROWS = 7, 2


def milliseconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Returns the medians of the time of a call, and of the time until everything is launched."""
    whole, launched = [], []
    for _ in range(CALLS + 2):
        _wait(device)
        start = time.perf_counter()
        call()
        launched.append(1e3 * (time.perf_counter() - start))
        _wait(device)
        whole.append(1e3 * (time.perf_counter() - start))
    return statistics.median(whole[2:]), statistics.median(launched[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names such as sd15")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    print("| model | arithmetic | ms | of it until all is launched |\n|---|---|---|---|")
    for name in options.models:
        if options.smoke:
            model, (args, kwargs) = tiny_families().tiny_denoiser(name, ROWS)
        else:
            model = build_denoiser(name, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
            args, kwargs = example_call(model, batch_size=ROWS)
        for arithmetic in ("float16", "W8A8"):
            if arithmetic == "W8A8":
                quantize(model, (args, kwargs))
                deploy(model, KernelProduct((device.type,)))
            whole, launched = milliseconds(lambda m=model, a=args, k=kwargs: m(*a, **k), device)  # type: ignore[misc]
            print(f"| {name} | {arithmetic} | {whole:.1f} | {launched:.1f} |", flush=True)


if __name__ == "__main__":
    main()
