"""Sampling with any diffusers pipeline, by the parameters that its `__call__` takes."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.failures import KINDS, is_fault_of_model, is_out_of_memory
from edadm_cli.models.families import family_of
from edadm_cli.models.from_folder import first_sentence
from edadm_cli.models.images import IMAGE_PARAMETERS, has_images, image_arguments, takes_images
from edadm_cli.models.quiet import pipeline_warnings, quiet_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from edadm_cli.models.loaded import LoadedModel

CALIBRATION, EVALUATION = 0, 1
"""Streams of image seeds: images for calibration and images for evaluation never share their noise."""

_STRIDE = 1_000_003  # number of images of one seed and stream before their seeds repeat those of the next one
_HANDLED = {
    "prompt",
    "class_labels",
    "batch_size",
    "num_inference_steps",
    "guidance_scale",
    "eta",
    "generator",
    *IMAGE_PARAMETERS,
}
_NEGATIVE_PROMPT = " "  # what authors of models with true guidance recommend where there is nothing to avoid
_NO_GUIDANCE = 1.0


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


def image_seed(seed: int, index: int, stream: int = CALIBRATION) -> int:
    r"""Returns the seed of one image: $((2s + k)\, 1000003 + i) \bmod 2^{32}$ for seed $s$, stream $k$ and image $i$.

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
    arguments = _call_arguments(model, list(seeds), prompts, num_steps, guidance_scale)
    last_sample: list[Tensor] = []
    try:
        with (
            torch.no_grad(),
            quiet_libraries(),
            pipeline_warnings() as warnings,
            _watch_scheduler(pipeline, arguments, last_sample),
            _explained_refusals(model),
            _seeded(seeds[0], pipeline.device),
        ):
            output = pipeline(**arguments)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(
            f"{model.ref.id}: the device ran out of memory with {len(seeds)} images at a time.",
            hint=_memory_hint(model, len(seeds)),
        ) from error
    if not last_sample:
        raise InputError(
            f"{type(pipeline).__name__} samples without steps of its scheduler, so it cannot be calibrated."
        )
    latents = last_sample[0][: len(seeds)].float().cpu()
    if not bool(latents.isfinite().all()):
        raise InputError(f"{model.ref.id}: sampling in {_dtype_name(model)} ended in values that are not finite.")
    return Samples(_to_bytes(_images_of(pipeline, output)), latents, tuple(warnings))


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Returns whether this pipeline takes prompts."""
    return "prompt" in _parameters(pipeline)


def takes_guidance(pipeline: DiffusionPipeline) -> bool:
    """Returns whether this pipeline has guidance with a scale."""
    return not {"guidance_scale", "true_cfg_scale"}.isdisjoint(_parameters(pipeline))


def default_guidance(pipeline: DiffusionPipeline, denoiser: nn.Module) -> float | None:
    """Returns a pipeline's default guidance scale; `None` if it has none."""
    name = "true_cfg_scale" if _has_true_guidance(pipeline, denoiser) else "guidance_scale"
    default = call_default(pipeline, name)
    return default if isinstance(default, int | float) else call_default(pipeline, "guidance_scale")


def _has_true_guidance(pipeline: DiffusionPipeline, denoiser: nn.Module) -> bool:
    """Returns whether guidance is a second prediction with a negative prompt whose scale is called `true_cfg_scale`.

    A denoiser that takes the scale as an input is guided by that input instead.
    """
    return "true_cfg_scale" in _parameters(pipeline) and not getattr(denoiser.config, "guidance_embeds", False)


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """Returns the default value of a parameter of the pipeline's `__call__`; `None` if there is none."""
    parameter = _parameters(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


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


def _parameters(pipeline: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def _call_arguments(
    model: LoadedModel,
    seeds: list[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> dict[str, Any]:
    pipeline, family = model.pipeline, family_of(model.denoiser)
    parameters = _parameters(pipeline)
    _require_known_parameters(model, parameters)
    arguments: dict[str, Any] = {
        "num_inference_steps": num_steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",  # as the pictures that a pipeline returns: some bring only these to [0, 1]
        **{name: value for name, value in family.call_arguments.items() if name in parameters},
        **model.entry.call_arguments,
        **image_arguments(pipeline, model.entry, seeds),
    }
    if takes_prompts(pipeline):
        if prompts is None:
            raise InputError(
                f"{model.ref.id} makes images from prompts, and none were given.",
                hint="--prompts FILE, one per line",
            )
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(seeds)} images need as many prompts, not {len(prompts)}.")
        arguments["prompt"] = list(prompts)
        if type(pipeline).__name__ in family.negative_prompt_pipelines:
            arguments["negative_prompt"] = [_NEGATIVE_PROMPT] * len(seeds)
        if type(pipeline).__name__ in family.one_prompt_pipelines:
            arguments |= _one_image(pipeline, prompts, arguments)
    if "class_labels" in parameters:
        labels = [_class_label(model, seed) for seed in seeds]
        if None not in labels:
            arguments["class_labels"] = labels
        elif parameters["class_labels"].default is inspect.Parameter.empty:
            raise InputError(f"{model.ref.id} needs class labels, and its denoiser does not say how many there are.")
    if "batch_size" in parameters:
        arguments["batch_size"] = len(seeds)
    if guidance_scale is not None and guidance_scale > _NO_GUIDANCE and _has_true_guidance(pipeline, model.denoiser):
        arguments["true_cfg_scale"] = guidance_scale
        arguments["negative_prompt"] = [_NEGATIVE_PROMPT] * len(seeds)
    elif guidance_scale is not None and "guidance_scale" in parameters:
        arguments["guidance_scale"] = guidance_scale
    if "eta" in parameters:
        arguments["eta"] = model.entry.eta
    return arguments


def _one_image(pipeline: DiffusionPipeline, prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns prompt, generator and images of a pipeline that takes no lists of them."""
    if len(prompts) > 1:
        raise InputError(
            f"{type(pipeline).__name__} takes one prompt at a time, and {len(prompts)} were given.",
            hint="--batch-size 1",
        )
    pictures = {name: arguments[name][0] for name in IMAGE_PARAMETERS if name in arguments}
    return {"prompt": prompts[0], "generator": arguments["generator"][0], **pictures}


def _require_known_parameters(model: LoadedModel, parameters: dict[str, inspect.Parameter]) -> None:
    pipeline = model.pipeline
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
    ]
    if not has_images(model.entry) and not set(required).isdisjoint(IMAGE_PARAMETERS):
        raise InputError(
            f"{type(pipeline).__name__} starts from images, and --images names none.", hint=_images_hint(model)
        )
    unknown = [name for name in required if name != "self" and name not in _HANDLED]
    if unknown:
        raise InputError(
            f"{type(pipeline).__name__} needs '{unknown[0]}' for every image, and only pipelines that start "
            "from noise, with or without prompts, class labels or images, are supported."
        )


def _class_label(model: LoadedModel, seed: int) -> int | None:
    """Returns the class of an image; `None` for a denoiser without classes."""
    config = model.denoiser.config
    declared: Any = getattr(model.denoiser, "num_classes", None)
    num_classes = declared or getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
    if not num_classes:
        return None
    return int(torch.randint(num_classes, (1,), generator=torch.Generator().manual_seed(seed)))


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
                f"{type(model.pipeline).__name__} of {model.ref.id} fails while it samples at full precision, so its "
                f"components or their configurations do not fit: {first_sentence(error)}",
                hint=_size_hint(model),
            ) from error
        has_none = not has_images(model.entry) and takes_images(model.pipeline)
        raise InputError(
            f"{type(model.pipeline).__name__} of {model.ref.id} does not sample with these arguments"
            f"{', and --images names no images' if has_none else ''}: {first_sentence(error)}",
            hint=_images_hint(model) if has_none else _size_hint(model),
        ) from error


def _memory_hint(model: LoadedModel, num_images: int) -> str | None:
    """Returns what makes sampling take less memory; `None` for one image of a pipeline that fixes its size."""
    if num_images > 1:
        return "a smaller --batch-size"
    return "edadm collect with a smaller --height and --width" if "height" in _parameters(model.pipeline) else None


def _images_hint(model: LoadedModel) -> str:
    """Returns the command that gives a pipeline its images."""
    has_mask = "mask_image" in _parameters(model.pipeline)
    masks = ", with NAME.mask.png beside each NAME.png" if has_mask else ""
    return f"edadm collect --model {model.ref.id} --images DIR{masks}"


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


@contextmanager
def _watch_scheduler(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], last_sample: list[Tensor]
) -> Iterator[None]:
    """Records the last sample of the scheduler while entered.

    It also passes the generators to the scheduler for a pipeline that adds noise at every step without them
    (LDMPipeline), whose noise would otherwise come from the global generator.
    """
    scheduler = pipeline.scheduler
    is_noisy = bool(arguments.get("eta")) and "generator" in inspect.signature(scheduler.step).parameters
    scheduler.step = _WatchedStep(scheduler, arguments["generator"] if is_noisy else None, last_sample)
    try:
        yield
    finally:
        del scheduler.step


class _WatchedStep:
    """Takes the place of a scheduler's `step` and keeps the last sample. A copy of the scheduler has its own `step`.

    The scheduler keeps its class, because pipelines compare it.

    Args:
        scheduler: The scheduler.
        generator: The generator of the step's noise, unless the pipeline passes one; `None` adds no generator.
        last_sample: A list that holds the latest sample.
    """

    def __init__(self, scheduler: Any, generator: Any, last_sample: list[Tensor]) -> None:
        functools.update_wrapper(self, scheduler.step)  # pipelines inspect the signature
        self._scheduler, self._generator, self._last_sample = scheduler, generator, last_sample
        self._step: Callable[..., Any] = scheduler.step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._generator is not None:
            kwargs.setdefault("generator", self._generator)
        output = self._step(*args, **kwargs)
        self._last_sample[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns the method of the copied scheduler, which `deepcopy` has created already."""
        return MethodType(type(self._scheduler).step, memo[id(self._scheduler)])


def _images_of(pipeline: DiffusionPipeline, output: Any) -> Tensor:
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
