"""A denoiser's call as the flat list of tensors that a graph takes.

The tensors of a call have dotted names: `sample`, `timestep`, `added_cond_kwargs.text_embeds`. Everything else is
fixed when the graph is made, and a call that brings other values is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edadm_cli.errors import InputError

WRAPPED = "denoiser"
"""Attribute under which the traced wrapper holds the denoiser: part of the names that tracing gives to nodes."""

_SAMPLE_NAMES = ("sample", "hidden_states", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t")
_RETURN_DICT = "return_dict"
_OUTPUT_LIBRARIES = ("diffusers", "edadm_cli")

Literal = bool | int | float | str


class CallInterface(BaseModel):
    """How the arguments of a call become the inputs of a graph.

    Attributes:
        denoiser: Name of the denoiser's class, for messages.
        parameters: Names of the denoiser's parameters, in order.
        inputs: Dotted names of the tensors, in the order of the graph's inputs.
        literals: Everything else by dotted name; what is `None` is left out.
        returns: Import path of the output class; `None` where the denoiser returns a tuple only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoiser: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    literals: dict[str, Literal]
    returns: str | None

    @classmethod
    def of(cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], returns: str | None) -> Any:
        """The interface of calls like the given one."""
        parameters = tuple(inspect.signature(denoiser.forward).parameters)
        tensors, literals = flatten(bind(parameters, args, kwargs))
        return cls(
            denoiser=type(denoiser).__name__,
            parameters=parameters,
            inputs=tuple(tensors),
            literals=literals,
            returns=returns,
        )

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The inputs of the graph for a call, float32 or int64.

        Raises:
            InputError: The call has other arguments than the one that the graph was made from.
        """
        tensors, literals = flatten(bind(self.parameters, args, kwargs))
        if literals != self.literals:
            name = min(key for key, _ in literals.items() ^ self.literals.items())
            raise InputError(
                f"{self.denoiser} is called with {name} = {literals.get(name)}, but its OpenVINO graph was made for"
                f" {self.literals.get(name)}."
            )
        if tensors.keys() != set(self.inputs):
            name = min(tensors.keys() ^ set(self.inputs))
            had = "without" if name in tensors else "with"
            raise InputError(f"The OpenVINO graph of {self.denoiser} was made for calls {had} '{name}'.")
        return [tensors[name] for name in self.inputs]

    def dtype(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.dtype:
        """Element type of a call's sample, which is that of the prediction."""
        bound = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        found = (bound[name].dtype for name in _SAMPLE_NAMES if isinstance(bound.get(name), Tensor))
        return next(found, torch.float32)

    def output(self, sample: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """What the denoiser itself would return for its output tensor."""
        if self.returns is None or not kwargs.get(_RETURN_DICT, True):
            return (sample,)
        module, _, name = self.returns.rpartition(".")
        if module.partition(".")[0] not in _OUTPUT_LIBRARIES:
            raise InputError(f"The OpenVINO files name the output class '{self.returns}', which is not of diffusers.")
        return getattr(import_module(module), name)(sample=sample)


def bind(parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, without `return_dict`; the timestep becomes float32 with one value a row of the sample."""
    bound = {**dict(zip(parameters, args, strict=False)), **kwargs}
    bound.pop(_RETURN_DICT, None)
    sample = next((bound[name] for name in _SAMPLE_NAMES if isinstance(bound.get(name), Tensor)), None)
    for name in _TIMESTEP_NAMES:
        if sample is not None and isinstance(bound.get(name), Tensor | int | float):
            bound[name] = torch.as_tensor(bound[name], dtype=torch.float32).reshape(-1).expand(sample.shape[0])
    return bound


def flatten(bound: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Literal]]:
    """Tensors and literals of arguments by dotted name.

    Raises:
        InputError: An argument is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    literals: dict[str, Literal] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", torch.float32 if value.is_floating_point() else torch.int64)
        elif isinstance(value, bool | int | float | str):
            literals[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{name}.{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                visit(f"{name}.{index}", item)
        elif value is not None:
            raise InputError(f"The denoiser is called with {name} of type {type(value).__name__}, which is not data.")

    for name, value in bound.items():
        visit(name, value)
    return tensors, literals


def rebuild(bound: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    """The arguments again, each tensor replaced by `tensor(its dotted name)`."""

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(name)
        if isinstance(value, Mapping):
            return {key: visit(f"{name}.{key}", item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(visit(f"{name}.{index}", item) for index, item in enumerate(value))
        return value

    return {name: visit(name, value) for name, value in bound.items()}
