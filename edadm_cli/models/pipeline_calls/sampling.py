"""Samples with any diffusers pipeline."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.pipeline_calls.call_arguments import call_arguments, images_hint
from edadm_cli.models.pipeline_calls.failures import KINDS, is_fault_of_model, is_out_of_memory
from edadm_cli.models.pipeline_calls.images import has_images, takes_images
from edadm_cli.models.pipeline_calls.parameters import call_parameters
from edadm_cli.models.pipeline_calls.watched_scheduler import watched_scheduler
from edadm_cli.models.quiet import PIPELINES, library_warnings, quiet_libraries
from edadm_cli.models.sources.from_folder import first_sentence

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from edadm_cli.models.loaded import LoadedModel


@dataclass(frozen=True)
class Samples:
    """Images and their latents.

    Attributes:
        images: 8-bit images, with shape `(N, C, H, W)`, on the CPU. The frames of a clip are side by side.
        latents: The sampler's last sample in float32: latents before decoding, or pixels in [-1, 1] for a
            pipeline without a decoder; with shape `(N, *)`, on the CPU.
        warnings: The warnings of the pipeline, each kind once.
    """

    images: Tensor
    latents: Tensor
    warnings: tuple[str, ...] = ()


def sample(
    model: LoadedModel,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> Samples:
    """Samples one image for each seed.

    Noise is generated image by image on the CPU, so neither the device nor the other images of the batch change it.

    Args:
        model: The pipeline.
        seeds: One seed per image.
        prompts: One prompt per image, for pipelines that take prompts.
        num_steps: T, the number of sampler steps.
        guidance_scale: Classifier-free guidance; `None` for the pipeline's own, or for one without guidance.

    Raises:
        InputError: The pipeline needs prompts or images and there are none, refuses its arguments, returns no images,
            or its samples are not finite.
        UsageError: `prompts` and `seeds` differ in number, or there are more steps than timesteps.
        MachineError: The device ran out of memory.
    """
    pipeline = model.pipeline
    require_num_steps(model, num_steps)
    arguments = call_arguments(model, list(seeds), prompts, num_steps, guidance_scale)
    last_sample: list[Tensor] = []
    with (
        torch.no_grad(),
        _explained_memory(model, len(seeds)),
        library_warnings(PIPELINES) as warnings,
        watched_scheduler(pipeline, arguments, last_sample),
        _explained_refusals(model),
        _seeded(seeds[0], pipeline.device),
    ):
        output = pipeline(**arguments)
    latents = _required_sample(model, last_sample)[: len(seeds)].float().cpu()
    if not bool(latents.isfinite().all()):
        raise InputError(f"{model.ref.id}: sampling in {_dtype_name(model)} ended in values that are not finite.")
    return Samples(_to_bytes(_images_of(pipeline, output)), latents, tuple(warnings))


def sample_with_gradients(
    model: LoadedModel,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> Tensor:
    """Samples as `sample` does, with gradients switched on, and stops after the last step of the scheduler.

    The parameters of the pipeline's components should have `requires_grad` off: otherwise all activations of all steps
    stay in memory. The arguments are those of `sample`.

    Returns:
        The sampler's last sample, with shape `(N, *)`, on the pipeline's device, with what it was computed from.

    Raises:
        InputError: As `sample` does, or the pipeline does not allow gradients.
        UsageError: As `sample` does.
        MachineError: The device ran out of memory.
    """
    pipeline = model.pipeline
    require_num_steps(model, num_steps)
    arguments = call_arguments(model, list(seeds), prompts, num_steps, guidance_scale)
    last_sample: list[Tensor] = []
    call = inspect.unwrap(type(pipeline).__call__)  # diffusers wraps it in torch.no_grad
    with (
        torch.enable_grad(),
        _explained_memory(model, len(seeds)),
        library_warnings(PIPELINES),
        watched_scheduler(pipeline, arguments, last_sample, decodes=False),
        _explained_refusals(model),
        _seeded(seeds[0], pipeline.device),
    ):
        call(pipeline, **arguments)
    return _required_sample(model, last_sample)[: len(seeds)]


def _required_sample(model: LoadedModel, last_sample: Sequence[Tensor]) -> Tensor:
    """Returns the last sample of a scheduler.

    Raises:
        InputError: There is none.
    """
    if not last_sample:
        raise InputError(
            f"{type(model.pipeline).__name__} samples without steps of its scheduler, so it cannot be calibrated."
        )
    return last_sample[0]


@contextmanager
def _explained_memory(model: LoadedModel, num_images: int) -> Iterator[None]:
    """Says what to do where the device runs out of memory; libraries are quiet while it is entered.

    Raises:
        MachineError: The device ran out of memory.
    """
    try:
        with quiet_libraries():
            yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(
            f"{model.ref.id}: the device ran out of memory with {num_images} images at a time.",
            hint=_memory_hint(model, num_images),
        ) from error


def require_num_steps(model: LoadedModel, num_steps: int) -> None:
    """Refuses more steps than the model has timesteps: schedulers would repeat some, or fail with an unclear error.

    Raises:
        UsageError: There are more steps than timesteps.
    """
    known = model.pipeline.scheduler.config.get("num_train_timesteps")
    if known is not None and num_steps > known:
        raise UsageError(
            f"{num_steps} sampler steps were requested, but {model.ref.id} has {known} timesteps.",
            hint=f"--num-steps {model.entry.num_steps}",
        )


@contextmanager
def _explained_refusals(model: LoadedModel) -> Iterator[None]:
    """Turns errors of a pipeline about its arguments, or about components that do not fit, into one sentence.

    Raises:
        InputError: The pipeline refused its arguments, or a component failed inside of its library.
    """
    try:
        yield
    except KINDS as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        if not isinstance(error, (ValueError, TypeError)) or not _is_refusal(error):
            if not is_fault_of_model(model.denoiser, error):
                raise
            raise InputError(
                f"{type(model.pipeline).__name__} of {model.ref.id} fails while it samples at full precision. Its "
                f"components, or its settings such as the number of steps, may not fit: {first_sentence(error)}",
                hint=_size_hint(model),
            ) from error
        has_none = not has_images(model.entry) and takes_images(model.pipeline)
        raise InputError(
            f"{type(model.pipeline).__name__} of {model.ref.id} does not sample with these arguments"
            f"{', and --images names no images' if has_none else ''}: {first_sentence(error)}",
            hint=images_hint(model) if has_none else _size_hint(model),
        ) from error


def _memory_hint(model: LoadedModel, num_images: int) -> str | None:
    """Returns what makes sampling take less memory; `None` for one image of a pipeline that fixes its size."""
    if num_images > 1:
        return "a smaller --batch-size"
    return "edadm collect with a smaller --height and --width" if "height" in call_parameters(model.pipeline) else None


def _size_hint(model: LoadedModel) -> str | None:
    """Returns the setting to look at where a denoiser says no size, or an odd one that it cannot halve."""
    config: Any = model.denoiser.config
    size = config.get("sample_size", 0)
    if size is not None and not (isinstance(size, int) and size % 2):
        return None
    text = "is missing" if size is None else f"is {size}"
    return f"set sample_size in {model.denoiser_name}/config.json, which {text}, to the size of the model's latents"


def _is_refusal(error: BaseException) -> bool:
    """Returns whether an error comes from a pipeline or its image processor rather than from a network."""
    frames = traceback.extract_tb(error.__traceback__)
    sources = [frame.filename.replace("\\", "/") for frame in frames]
    in_pipeline = any("/diffusers/pipelines/" in source or "/diffusers/image_processor" in source for source in sources)
    return in_pipeline and not any("/diffusers/models/" in source for source in sources)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators while entered: some pipelines use them, whatever generators they are given."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _images_of(pipeline: DiffusionPipeline, output: Any) -> Tensor:
    """Returns the images `(N, C, H, W)` in a pipeline's output, or the frames of its clips side by side.

    Raises:
        InputError: There are neither images nor clips.
    """
    images = getattr(output, "images", None)
    images = getattr(output, "frames", None) if images is None else images
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).movedim(-1, 1 if images.ndim == 4 else 2)
    if isinstance(images, Tensor) and images.ndim == 5:  # a clip: [N, F, C, H, W] -> [N, C, H, F * W]
        images = images.permute(0, 2, 3, 1, 4).flatten(3)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError(
            f"{type(pipeline).__name__} returns neither images nor clips, and nothing else can be quantized here."
        )
    return images


def _dtype_name(model: LoadedModel) -> str:
    return str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")


def _to_bytes(images: Tensor) -> Tensor:
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
