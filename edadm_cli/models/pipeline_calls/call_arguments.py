"""Finds the values of a pipeline's arguments: prompts, class labels, images, guidance, steps and noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.families import family_of
from edadm_cli.models.pipeline_calls.images import IMAGE_PARAMETERS, has_images, image_arguments
from edadm_cli.models.pipeline_calls.parameters import call_default, call_parameters, takes_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from edadm_cli.models.loaded import LoadedModel

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


def default_guidance(pipeline: DiffusionPipeline, denoiser: nn.Module) -> float | None:
    """Returns a pipeline's default guidance scale; `None` if it has none."""
    name = "true_cfg_scale" if _has_true_guidance(pipeline, denoiser) else "guidance_scale"
    default = call_default(pipeline, name)
    return default if isinstance(default, int | float) else call_default(pipeline, "guidance_scale")


def _has_true_guidance(pipeline: DiffusionPipeline, denoiser: nn.Module) -> bool:
    """Returns whether guidance is a second prediction with a negative prompt whose scale is called `true_cfg_scale`.

    A denoiser that takes the scale as an input is guided by that input instead.
    """
    return "true_cfg_scale" in call_parameters(pipeline) and not getattr(denoiser.config, "guidance_embeds", False)


def call_arguments(
    model: LoadedModel,
    seeds: list[int],
    prompts: Sequence[str] | None,
    num_steps: int,
    guidance_scale: float | None,
) -> dict[str, Any]:
    """Returns the arguments with which a pipeline samples one image for each seed.

    Args:
        model: The pipeline.
        seeds: One seed per image.
        prompts: One prompt per image, for pipelines that take prompts.
        num_steps: T, the number of sampler steps.
        guidance_scale: Classifier-free guidance; `None` for the pipeline's own, or for one without guidance.

    Raises:
        InputError: The pipeline needs prompts, images or class labels and there are none, or it needs something else
            for every image.
        UsageError: `prompts` and `seeds` differ in number.
    """
    pipeline, family = model.pipeline, family_of(model.denoiser)
    parameters = call_parameters(pipeline)
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
        given = _required_prompts(model, prompts, len(seeds))
        arguments["prompt"] = given
        if type(pipeline).__name__ in family.negative_prompt_pipelines:
            arguments["negative_prompt"] = [_NEGATIVE_PROMPT] * len(seeds)
        if type(pipeline).__name__ in family.one_prompt_pipelines:
            arguments |= _one_image(pipeline, given, arguments)
    if "class_labels" in parameters:
        arguments |= _class_labels(model, seeds, is_required=_is_required(parameters["class_labels"]))
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


def _required_prompts(model: LoadedModel, prompts: Sequence[str] | None, num_images: int) -> list[str]:
    """Returns one prompt per image.

    Raises:
        InputError: There are no prompts.
        UsageError: Their number is another one.
    """
    if prompts is None:
        raise InputError(
            f"{model.ref.id} makes images from prompts, and none were given.",
            hint="--prompts FILE, one per line",
        )
    if len(prompts) != num_images:
        raise UsageError(f"{num_images} images need as many prompts, not {len(prompts)}.")
    return list(prompts)


def _class_labels(model: LoadedModel, seeds: Sequence[int], is_required: bool) -> dict[str, list[int | None]]:
    """Returns the argument with the class of each image; nothing for a denoiser without classes.

    Raises:
        InputError: The pipeline requires classes, and the denoiser has none.
    """
    labels = [_class_label(model, seed) for seed in seeds]
    if None not in labels:
        return {"class_labels": labels}
    if is_required:
        raise InputError(f"{model.ref.id} needs class labels, and its denoiser does not say how many there are.")
    return {}


def _is_required(parameter: inspect.Parameter) -> bool:
    """Returns whether a parameter has no default and is not a collection of all others."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


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
    """Raises an `InputError` if the pipeline needs images that were not named, or an unknown argument."""
    pipeline = model.pipeline
    required = [name for name, parameter in parameters.items() if _is_required(parameter)]
    if not has_images(model.entry) and not set(required).isdisjoint(IMAGE_PARAMETERS):
        raise InputError(
            f"{type(pipeline).__name__} starts from images, and --images names none.", hint=images_hint(model)
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


def images_hint(model: LoadedModel) -> str:
    """Returns the command that gives a pipeline its images."""
    has_mask = "mask_image" in call_parameters(model.pipeline)
    masks = ", with NAME.mask.png beside each NAME.png" if has_mask else ""
    return f"edadm collect --model {model.ref.id} --images DIR{masks}"
