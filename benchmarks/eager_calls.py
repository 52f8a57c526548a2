"""Times one call of a denoiser in eager torch on a GPU: float16, and a W8A8 export that `from_pretrained` loads.

    python benchmarks/eager_calls.py sd15 sdxl
    python benchmarks/eager_calls.py --smoke unet

For each model it prints the median milliseconds of a call with two rows until the GPU is ready, of these the
milliseconds until Python has launched everything, and the memory that torch holds on the GPU afterwards. The export is
timed twice: with each kernel launched by Python (`EDADM_CUDA_GRAPHS=0`), and as it is loaded, when its calls are
recorded as CUDA graphs. Weights are random and rounded to nearest. `--smoke` runs a tiny network on a CPU, where the
export computes in floating point, nothing is recorded, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from gpu_models import quantize, tiny_families

from edadm_cli.engines.cuda.recording import WARM_UP, leave_unrecorded, record_calls
from edadm_cli.integrations.deployment import make_ready
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import build_denoiser

CALLS, ROWS = 7, 2
FIRST = WARM_UP + 3  # calls that compile kernels, are observed, or are recorded


def milliseconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Returns the medians of the time of a call, and of the time until everything is launched."""
    whole, launched = [], []
    for _ in range(FIRST + CALLS):
        _wait(device)
        start = time.perf_counter()
        call()
        launched.append(1e3 * (time.perf_counter() - start))
        _wait(device)
        whole.append(1e3 * (time.perf_counter() - start))
    return statistics.median(whole[FIRST:]), statistics.median(launched[FIRST:])


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
    print("| model | arithmetic | ms | of it until all is launched | MiB |\n|---|---|---|---|---|")
    for name in options.models:
        if options.smoke:
            model, (args, kwargs) = tiny_families().tiny_denoiser(name, ROWS)
        else:
            model = build_denoiser(name, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
            args, kwargs = example_call(model, batch_size=ROWS)
        for arithmetic in ("float16", "W8A8, kernel by kernel", "W8A8"):
            if arithmetic == "W8A8, kernel by kernel":
                quantize(model, (args, kwargs))
                make_ready(model)
                model.to(device)
                leave_unrecorded(model)
            elif arithmetic == "W8A8" and device.type == "cuda":
                record_calls(model)
            whole, launched = milliseconds(lambda m=model, a=args, k=kwargs: m(*a, **k), device)  # type: ignore[misc]
            print(f"| {name} | {arithmetic} | {whole:.1f} | {launched:.1f} | {_mebibytes(device)} |", flush=True)


def _mebibytes(device: torch.device) -> str:
    """Returns the memory that torch holds on a GPU and cannot free; of a CPU it is not known."""
    if device.type == "cpu":
        return ""
    gc.collect()
    torch.cuda.empty_cache()
    return f"{torch.cuda.memory_reserved(device) / 2**20:,.0f}"


if __name__ == "__main__":
    main()
