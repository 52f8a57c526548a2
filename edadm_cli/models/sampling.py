"""Sampling with any diffusers pipeline, by the parameters that its `__call__` takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from edadm_cli.models.loading import LoadedModel

CALIBRATION, EVALUATION = 0, 1
"""Streams of image seeds: images that calibrate and images that judge never share their noise."""

_STRIDE = 1_000_003  # images of one seed and stream before they meet those of the next
_HANDLED = {
    "prompt",
    "class_labels",
    "batch_size",
    "num_inference_steps",
    "guidance_scale",
    "eta",
    "generator",
}


@dataclass(frozen=True)
class Samples:
    """Images and what they were decoded from.

    Attributes:
        images: 8-bit images, with shape `(N, C, H, W)`, on the CPU.
        latents: The sampler's last sample in float32: latents before decoding, or pixels in [-1, 1] for a
            pipeline without a decoder; with shape `(N, *)`, on the CPU.
    """

    images: Tensor
    latents: Tensor


def image_seed(seed: int, index: int, stream: int = CALIBRATION) -> int:
    r"""Seed of one image: $((2s + k)\, 1000003 + i) \bmod 2^{32}$ for seed $s$, stream $k$ and image $i$.

    Torch's CPU generator uses 32 bits of a seed, so distinct images keep distinct noise only within those.
    """
    return ((2 * seed + stream) * _STRIDE + index) % 2**32


def sample(
    model: LoadedModel,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> Samples:
    """Sample one image for each seed.

    Noise is drawn image by image on the CPU, so neither the device nor the other images of the batch change
    it.

    Args:
        model: The pipeline.
        seeds: One seed an image.
        prompts: One prompt an image, for pipelines that take prompts.
        num_steps: T, sampler steps.
        guidance_scale: Classifier-free guidance; `None` for the pipeline's own, or for one without guidance.

    Raises:
        InputError: The pipeline needs prompts and there are none, needs something that is not known here,
            returns no images, or its samples are not finite.
        UsageError: `prompts` and `seeds` differ in number, or there are more steps than timesteps.
        MachineError: The device ran out of memory.
    """
    pipeline = model.pipeline
    require_num_steps(model, num_steps)
    arguments = _call_arguments(model, list(seeds), prompts, num_steps, guidance_scale)
    last_sample: list[Tensor] = []
    try:
        with torch.no_grad(), quiet_libraries(), _watch_scheduler(pipeline, arguments, last_sample):
            output = pipeline(**arguments)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{model.ref.id}: the device ran out of memory with {len(seeds)} images at a time.",
            hint="a smaller --batch-size",
        ) from error
    latents = last_sample[0][: len(seeds)].float().cpu()
    if not bool(latents.isfinite().all()):
        raise InputError(f"{model.ref.id}: sampling in {_dtype_name(model)} ended in values that are not finite.")
    return Samples(_to_bytes(_images_of(pipeline, output)), latents)


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether images of this pipeline are asked for in words."""
    return "prompt" in _parameters(pipeline)


def takes_guidance(pipeline: DiffusionPipeline) -> bool:
    """Whether this pipeline has classifier-free guidance."""
    return "guidance_scale" in _parameters(pipeline)


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """Default value of a parameter of the pipeline's `__call__`; `None` where there is none."""
    parameter = _parameters(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def require_num_steps(model: LoadedModel, num_steps: int) -> None:
    """Refuse more steps than the model has timesteps: schedulers would repeat some, or fail in words of their own.

    Raises:
        UsageError: There are more.
    """
    known = model.pipeline.scheduler.config.get("num_train_timesteps")
    if known is not None and num_steps > known:
        raise UsageError(
            f"{num_steps} sampler steps were asked for, and {model.ref.id} has {known} timesteps.",
            hint=f"--num-steps {model.entry.num_steps}",
        )


def _parameters(pipeline: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def _call_arguments(
    model: LoadedModel,
    seeds: list[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> dict[str, Any]:
    pipeline = model.pipeline
    parameters = _parameters(pipeline)
    _require_known_parameters(pipeline, parameters)
    arguments: dict[str, Any] = {
        "num_inference_steps": num_steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
    }
    if takes_prompts(pipeline):
        if prompts is None:
            raise InputError(
                f"{model.ref.id} makes images from prompts, and none were given.",
                hint="--prompts FILE, one a line",
            )
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(seeds)} images need as many prompts, not {len(prompts)}.")
        arguments["prompt"] = list(prompts)
    if "class_labels" in parameters:
        arguments["class_labels"] = [_class_label(model, seed) for seed in seeds]
    if "batch_size" in parameters:
        arguments["batch_size"] = len(seeds)
    if guidance_scale is not None and "guidance_scale" in parameters:
        arguments["guidance_scale"] = guidance_scale
    if "eta" in parameters:
        arguments["eta"] = model.entry.eta
    return arguments


def _require_known_parameters(pipeline: DiffusionPipeline, parameters: dict[str, inspect.Parameter]) -> None:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    unknown = [
        name
        for name, parameter in parameters.items()
        if name != "self"
        and name not in _HANDLED
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in variadic
    ]
    if unknown:
        raise InputError(
            f"{type(pipeline).__name__} needs '{unknown[0]}' for every image, and only pipelines that start "
            "from noise, with or without prompts or class labels, are supported."
        )


def _class_label(model: LoadedModel, seed: int) -> int:
    config = model.denoiser.config
    own: Any = getattr(model.denoiser, "num_classes", None)
    num_classes = own or getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
    if not num_classes:
        raise InputError(f"{model.ref.id} wants class labels, and its denoiser does not say how many there are.")
    return int(torch.randint(num_classes, (1,), generator=torch.Generator().manual_seed(seed)))


@contextmanager
def _watch_scheduler(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], last_sample: list[Tensor]
) -> Iterator[None]:
    """Keep the sample that the scheduler returned last.

    A pipeline that draws fresh noise at every step without handing its generators on (LDMPipeline) is mended: else the
    noise would come from the global generator.
    """
    scheduler = pipeline.scheduler
    step: Callable[..., Any] = scheduler.step
    is_noisy = bool(arguments.get("eta")) and "generator" in inspect.signature(step).parameters

    @functools.wraps(step)  # pipelines inspect the signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        if is_noisy:
            kwargs.setdefault("generator", arguments["generator"])
        output = step(*args, **kwargs)
        last_sample[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _images_of(pipeline: DiffusionPipeline, output: Any) -> Tensor:
    images = getattr(output, "images", None)
    if isinstance(images, np.ndarray):  # older pipelines: channels last
        images = torch.from_numpy(images).movedim(-1, 1)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError(f"{type(pipeline).__name__} does not return images, and only images are supported.")
    return images


def _dtype_name(model: LoadedModel) -> str:
    return str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")


def _to_bytes(images: Tensor) -> Tensor:
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
