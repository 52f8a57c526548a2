"""A program that has imported diffusers and nothing of ours, and makes the round trip of an export on request.

It forks for every request, a line of JSON: each export meets an interpreter in which no other has been loaded, and the
imports are paid for once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEED, NUM_STEPS = 4, 2


class FreshInterpreter:
    """The program, started; `ask` gives what `round_trip` returns there."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Make a round trip in an interpreter of its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "failure" not in answer, answer["failure"]
        return answer

    def close(self) -> None:
        """End the program."""
        self._process.communicate()


def image_digest(pipeline: Any, arguments: dict[str, Any]) -> str:
    """Hash of the image that a pipeline draws from one seed."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(SEED)]
    images = pipeline(**arguments, num_inference_steps=NUM_STEPS, generator=generator, output_type="np").images
    return sha256(images.tobytes()).hexdigest()


def round_trip(folder: str, again: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Load an export with plain diffusers, draw, save it, load that, draw, and cast it."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    classes = [type(part).__name__ for part in (pipeline, denoiser, pipeline.scheduler)]
    layers = sum(type(module).__name__ == "QuantizedLayer" for module in denoiser.modules())
    first = image_digest(pipeline, arguments)
    pipeline.save_pretrained(again)
    second = image_digest(DiffusionPipeline.from_pretrained(again), arguments)
    buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers() if name.endswith("_scale")}
    pipeline.to(torch.bfloat16)
    cast = dict(denoiser.named_buffers())
    return {
        "classes": classes,
        "layers": layers,
        "images": [first, second],
        "scales": len(buffers),
        "scales_kept": all(torch.equal(cast[name], buffer) for name, buffer in buffers.items()),
        "scale_dtypes": sorted({str(cast[name].dtype) for name in buffers}),
        "dtypes": sorted({str(parameter.dtype) for parameter in denoiser.parameters()}),
    }


def _serve() -> None:
    if not any(entry.name == "edadm" for entry in importlib.metadata.entry_points(group="torch.backends")):
        import edadm_cli  # noqa: F401 - installed, the package is found through its entry point
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            answer = round_trip(**json.loads(line))
        except BaseException:  # noqa: BLE001 - whatever it was, the test tells
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
        os._exit(0)


if __name__ == "__main__":
    _serve()
