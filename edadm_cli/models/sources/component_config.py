"""Checks the configuration of a component before a library builds anything from it.

A library trusts a configuration: it would build a hundred thousand layers, or fail with an error about its own code.
The errors here name the component and the field. `containment.bounded_size` compares a network with its weights.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import DENOISER_NAMES
from edadm_cli.models.sources.files import entries, read_json_object

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MAX_SIZE, _MAX_IMAGE, _MAX_WIDTH, _MAX_INTEGER, _MAX_TIMESTEPS = 1024, 65_536, 1_000_000, 2**31 - 1, 100_000
_PREDICTION_TYPES = ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction")
_SPACINGS = ("leading", "trailing", "linspace")
# A class of many architectures under one name, which diffusers replaces while it loads.
_LEGACY_CLASSES = ("Transformer2DModel",)

Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _whole(smallest: int, largest: int) -> Rule:
    return lambda value: _is_whole(value, smallest, largest), f"an integer from {smallest} to {largest}"


def _sizes(largest: int) -> Rule:
    def is_size(value: Any) -> bool:
        sides = value if isinstance(value, list) and 1 <= len(value) <= 3 else [value]
        return all(_is_whole(side, 1, largest) for side in sides)

    return is_size, f"an integer from 1 to {largest}, or a list of two or three"


def _one_of(*values: str) -> Rule:
    return lambda value: isinstance(value, str) and value in values, "one of " + ", ".join(values)


_POSITIVE: Rule = (lambda value: _is_number(value) and value > 0, "a number above 0")
_NUMBER: Rule = (_is_number, "a number")
_SHARE: Rule = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_NUMBERS: Rule = (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers")

_MODULES: dict[str, Rule] = {
    "in_channels": _sizes(_MAX_WIDTH),
    "out_channels": _sizes(_MAX_WIDTH),
    "latent_channels": _whole(1, _MAX_WIDTH),
    "pos_embed_max_size": _whole(1, _MAX_SIZE),
    "scaling_factor": _POSITIVE,
    "shift_factor": _NUMBER,
    "latents_mean": _NUMBERS,
    "latents_std": _NUMBERS,
    "sample_size": _sizes(_MAX_SIZE),
}
_AUTOENCODERS = _MODULES | {"sample_size": _sizes(_MAX_IMAGE)}
_SCHEDULERS: dict[str, Rule] = {
    "prediction_type": _one_of(*_PREDICTION_TYPES),
    "num_train_timesteps": _whole(1, _MAX_TIMESTEPS),
    "beta_start": _SHARE,
    "beta_end": _SHARE,
    "beta_schedule": (lambda value: isinstance(value, str), "a text"),
    "trained_betas": _NUMBERS,
    "timestep_spacing": _one_of(*_SPACINGS),
    "steps_offset": _whole(0, _MAX_TIMESTEPS),
    "shift": _NUMBER,
}
_TOKENIZERS: dict[str, Rule] = {
    "model_max_length": (lambda value: _is_number(value) and value >= 1, "a number of at least 1")
}


def require_sound_config(name: str, cls: type, descriptions: tuple[Path, ...]) -> None:
    """Checks the fields of a component's configuration for type and range.

    Args:
        name: The component's name, such as `vae`.
        cls: Its class.
        descriptions: Its configuration files.

    Raises:
        InputError: A field has a value of another type, or one that no model has.
    """
    import diffusers
    from torch import nn

    if issubclass(cls, nn.Module):
        rules = _AUTOENCODERS if _is_autoencoder(cls) else _MODULES
        rules = rules if issubclass(cls, diffusers.ModelMixin) else {}
    else:
        rules = _SCHEDULERS if issubclass(cls, diffusers.SchedulerMixin) else _TOKENIZERS
    for path in descriptions:
        if path.name not in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            continue
        content = read_json_object(path)
        for field, (is_sound, expected) in rules.items():
            value = content.get(field)
            if value is not None and not is_sound(value):
                raise InputError(f"{path}: '{field}' of the {name} is {_shown(value)}; {expected} was expected.")
        if path.name == "config.json":
            _require_bounded_numbers(path, name, content)


def require_fitting_classes(index: Path, pipeline_class: type[DiffusionPipeline], components: dict[str, type]) -> None:
    """Refuses a denoiser of another class than the pipeline is made for, such as a video pipeline's for an image model.

    Raises:
        InputError: The classes do not fit.
    """
    try:
        hints = typing.get_type_hints(pipeline_class.__init__)
    except (NameError, TypeError, AttributeError):
        return  # the annotations refer to a library that is not installed
    for name in DENOISER_NAMES:
        cls, hint = components.get(name), hints.get(name)
        expected = tuple(part for part in (hint, *typing.get_args(hint)) if isinstance(part, type))
        if cls is None or not expected or not cls.__module__.startswith("diffusers."):
            continue
        if not issubclass(cls, expected) and cls.__name__ not in _LEGACY_CLASSES:
            raise InputError(
                f"{index}: a {pipeline_class.__name__} takes a {expected[0].__name__} for '{name}', "
                f"and the model has a {cls.__name__}."
            )


def require_sound_options(index: Path, pipeline_class: type[DiffusionPipeline], options: dict[str, Any]) -> None:
    """Checks the type of a pipeline's own options by that of their default values.

    Raises:
        InputError: An option has another type.
    """
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        value = options.get(name)
        if value is None or parameter.default in (None, inspect.Parameter.empty):
            continue
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise InputError(f"{index}: '{name}' is {_shown(value)}; true or false was expected.")
        if _is_number(parameter.default) and not (_is_number(value) and abs(value) <= _MAX_INTEGER):
            raise InputError(f"{index}: '{name}' is {_shown(value)}; a number was expected.")


def require_short_prompts(folder: Path, components: dict[str, Any]) -> None:
    """Checks that CLIP's text encoders have a position for every token that their tokenizers give.

    Raises:
        InputError: A tokenizer gives more tokens.
    """
    for suffix in ("", "_2", "_3"):
        tokenizer: Any = components.get(f"tokenizer{suffix}")
        encoder: Any = components.get(f"text_encoder{suffix}")
        if not type(encoder).__name__.startswith("CLIPText") or not hasattr(tokenizer, "model_max_length"):
            continue
        positions = getattr(encoder.config, "max_position_embeddings", None)
        if positions is not None and tokenizer.model_max_length > positions:
            raise InputError(
                f"{folder}: the 'model_max_length' of tokenizer{suffix} is {tokenizer.model_max_length:.6g}, "
                f"and text_encoder{suffix} has {positions} positions."
            )


def _is_autoencoder(cls: type) -> bool:
    return cls.__name__.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQ", "ConsistencyDecoder"))


def _require_bounded_numbers(path: Path, name: str, content: dict[str, Any]) -> None:
    for field, value, _ in entries(content):
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise InputError(f"{path}: '{field}' of the {name} is {_shown(value)}; no model has such a number.")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of more than 30 digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
