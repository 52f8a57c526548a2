"""A denoiser's call as the inputs of a graph: the sample, one timestep a row, and the tensors of the condition.

What a call holds besides tensors is fixed when the graph is made; a call that brings anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.calls import SAMPLE, TIMESTEP, DenoiserCall, Template, build_call, split_call

OUTPUT = "prediction"
_RETURN_DICT = "return_dict"
_OUTPUT_LIBRARY = "diffusers"


class GraphInterface(BaseModel):
    """How the arguments of a call become the inputs of a graph.

    Attributes:
        denoiser: Class of the denoiser.
        parameters: Names of its parameters, in order.
        arguments: Of a call, in the form of `models.calls.Template`, all by keyword.
        inputs: Names of the graph's inputs, in order.
        returns: Import path of the class that the denoiser returns; `None`: it returns a tuple.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoiser: str
    parameters: tuple[str, ...]
    arguments: dict[str, Any] = Field(description="keyword -> place of a tensor, or a literal")
    inputs: tuple[str, ...]
    returns: str | None = None

    @classmethod
    def of(cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphInterface:
        """The interface of calls like the given one."""
        parameters = tuple(inspect.signature(denoiser.forward).parameters)
        call = _split(parameters, args, kwargs)
        inputs = (SAMPLE, TIMESTEP, *call.tensors)
        arguments = call.template["kwargs"]
        return cls(denoiser=type(denoiser).__name__, parameters=parameters, arguments=arguments, inputs=inputs)

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of the graph for a call by name, on the CPU, float32 or int64.

        Raises:
            InputError: The call differs from the one that the graph was made from in more than its tensors.
        """
        call = _split(self.parameters, args, kwargs)
        found = call.template["kwargs"]
        if found != self.arguments:
            name = min(key for key in found.keys() | self.arguments.keys() if found.get(key) != self.arguments.get(key))
            raise InputError(
                f"{self.denoiser} is called with another '{name}' than its ONNX graph was made for:"
                f" {found.get(name)} instead of {self.arguments.get(name)}."
            )
        rows = call.timestep.float().reshape(1).expand(call.sample.shape[0])
        given = {SAMPLE: call.sample, TIMESTEP: rows, **call.tensors}
        return {name: _graph_type(given[name]) for name in self.inputs}

    def call(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the denoiser for inputs of the graph."""
        template: Template = {"args": [], "kwargs": self.arguments}
        return build_call(template, tensors[SAMPLE], tensors[TIMESTEP], tensors)[1]

    def output(self, prediction: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """What the denoiser itself would return for its prediction.

        Raises:
            InputError: The class that it returned is not one of diffusers.
        """
        if self.returns is None or not kwargs.get(_RETURN_DICT, True):
            return (prediction,)
        module, _, name = self.returns.rpartition(".")
        if module.partition(".")[0] != _OUTPUT_LIBRARY:
            raise InputError(f"The ONNX files name the output class '{self.returns}', which is not one of diffusers.")
        return getattr(import_module(module), name)(sample=prediction)


def _split(parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserCall:
    bound = {**dict(zip(parameters, args, strict=False)), **kwargs}
    bound.pop(_RETURN_DICT, None)
    # what is None is left out: pipelines differ in whether they name it
    return split_call(nn.Module(), (), {name: value for name, value in bound.items() if value is not None})


def _graph_type(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64)
