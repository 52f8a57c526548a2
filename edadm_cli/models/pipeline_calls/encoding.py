"""Encodes all prompts before sampling, so that text encoders and denoiser need not fit in memory together.

Pipelines of diffusers turn prompts into tensors in one method, `encode_prompt`. First each batch runs up to its first
call of the denoiser, while the results of the method are stored on the CPU together with its arguments. Then the
weights of the text encoders are freed. From then on, the method returns the stored result for equal arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.placement import is_encoder
from edadm_cli.models.stored import bring_stored

_METHOD = "encode_prompt"


def encode_first(model: LoadedModel, batches: Iterable[Callable[[], object]]) -> None:
    """Encodes the prompts of all batches, frees the text encoders, and loads the denoiser; see `Placement`.

    A pipeline without a method `encode_prompt` keeps its encoders. With the placement `memory` nothing happens.

    Args:
        model: The pipeline, which is changed. Afterwards it can sample these batches and no others.
        batches: Functions, each of which samples one batch.
    """
    if model.placement == "memory":
        return
    pipeline: Any = model.pipeline
    denoisers = [each.denoiser for each in model.by_denoiser().values()]
    if hasattr(pipeline, _METHOD):
        encoded = _Encoded(getattr(pipeline, _METHOD), model)
        pipeline.encode_prompt = encoded.method
        for batch in batches:
            _run_to_denoiser(denoisers, batch)
        if encoded.results:
            encoded.is_complete = True
            _free_encoders(pipeline)
    if model.placement == "turns":
        for denoiser in denoisers:
            bring_stored(denoiser)


class _EnoughError(Exception):
    """Ends a batch at its first call of the denoiser. It never leaves this module."""


class _Encoded:
    """Wraps `encode_prompt` and keeps its results by their arguments."""

    def __init__(self, encode: Callable[..., Any], model: LoadedModel) -> None:
        self.results: dict[str, Any] = {}
        self.is_complete = False

        @wraps(encode)  # pipelines inspect the signature
        def method(*args: Any, **kwargs: Any) -> Any:
            key = sha256(repr(_plain((args, kwargs))).encode()).hexdigest()
            if key not in self.results:
                if self.is_complete:
                    raise InputError(
                        f"{type(model.pipeline).__name__} encodes a prompt that it had not encoded before sampling, "
                        "and its text encoders have left the memory.",
                        hint="--weights memory",
                    )
                with torch.no_grad():
                    self.results[key] = _moved(encode(*args, **kwargs), torch.device("cpu"))
            return _moved(self.results[key], model.pipeline.device)

        self.method = method


def _run_to_denoiser(denoisers: Iterable[nn.Module], batch: Callable[[], object]) -> None:
    def enough(*_: Any) -> None:
        raise _EnoughError

    with Hooks() as hooks, suppress(_EnoughError):
        for denoiser in denoisers:
            hooks.before(denoiser, enough)
        batch()


def _free_encoders(pipeline: Any) -> None:
    """Frees the weights of the text encoders. Their device and element type stay, because pipelines read them."""
    for name, component in pipeline.components.items():
        if is_encoder(name) and isinstance(component, nn.Module):
            for parameter in component.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    """Returns arguments in a form whose `repr` is equal only for equal arguments."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return (value.size, value.tobytes()) if hasattr(value, "tobytes") else value


def _moved(value: Any, device: torch.device) -> Any:
    """Returns a nested value with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({key: _moved(each, device) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
