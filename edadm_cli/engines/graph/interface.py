"""Turns a denoiser's call into the inputs of a graph: the sample, one timestep per row, and the condition's tensors.

All other arguments of a call are fixed when the graph is made. A call with other values of them is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.call_templates import SAMPLE, TIMESTEP, build_call, is_tensor, per_row
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, split_arguments
from edadm_cli.models.families import family_of
from edadm_cli.models.families.family import UNDESCRIBED, DenoiserFamily
from edadm_cli.models.families.registry import trusted_packages

_MARKS = re.compile(r"\.\$\w+")  # of templates, such as that of a tuple, which a message leaves out
_RETURN_DICT = "return_dict"
_OUTPUT_LIBRARIES = ("diffusers", "edadm_cli")


class GraphInterface(BaseModel):
    """Says how the arguments of a call become the inputs of a graph.

    Attributes:
        denoiser: The name of the denoiser's class.
        parameters: The names of the parameters of its `forward`, in order.
        arguments: The arguments of a call, all by keyword, in the form of `denoiser_calls.call_templates.Template`.
        inputs: The names of the graph's inputs, in order.
        returns: The import path of the class that the denoiser returns; `None` if it returns a tuple.
        masks: The inputs that are masks, each with the input whose tokens it masks. Where a call omits a mask, no token
            is masked.
        returns_list: Whether the denoiser returns a list with one tensor per row, which the graph stacks.
        rows: The number of rows that calls must have; `None` if any number is possible.
        fixed: The SHA-256 of the values of each input that calls may not change, by name. The denoiser read these
            values, such as a mask's number of tokens, in Python while it was traced.
        has_read_sizes: Whether the denoiser read a size in Python, so that the graph may not fit other sizes.
        booleans: The inputs that are boolean, such as masks that attention takes as they are.
        sample_arguments: The names that the noisy sample may have as an argument.
        timestep_arguments: The names that the timestep may have as an argument.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoiser: str
    parameters: tuple[str, ...]
    arguments: dict[str, Any] = Field(description="keyword -> place of a tensor, or a literal")
    inputs: tuple[str, ...]
    returns: str | None = None
    masks: dict[str, str] = {}
    returns_list: bool = False
    rows: int | None = None
    fixed: dict[str, str] = {}
    has_read_sizes: bool = False
    booleans: tuple[str, ...] = ()
    sample_arguments: tuple[str, ...] = UNDESCRIBED.sample_arguments
    timestep_arguments: tuple[str, ...] = UNDESCRIBED.timestep_arguments

    @property
    def is_specific(self) -> bool:
        """Returns whether the graph may fit only calls that agree with the example in more than its form."""
        return self.rows is not None or bool(self.fixed) or self.has_read_sizes

    def specific(
        self, tensors: Mapping[str, Tensor], has_fixed_rows: bool, values: Iterable[str], has_read_sizes: bool
    ) -> GraphInterface:
        """Returns the interface of a graph that fits only some calls.

        Args:
            tensors: The inputs of the example call.
            has_fixed_rows: Whether calls must have as many rows as the example.
            values: The names of the inputs that must have the same values as in the example.
            has_read_sizes: Whether the denoiser read a size in Python.
        """
        fixed = {name: _digest(tensors[name]) for name in sorted(values)}
        number = tensors[SAMPLE].shape[0] if has_fixed_rows else None
        return self.model_copy(update={"rows": number, "fixed": fixed, "has_read_sizes": has_read_sizes})

    @classmethod
    def of(cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphInterface:
        """Returns the interface of calls like the given one."""
        parameters = tuple(inspect.signature(denoiser.forward).parameters)
        family = family_of(denoiser)
        form = cls(
            denoiser=type(denoiser).__name__,
            parameters=parameters,
            arguments={},
            inputs=(),
            sample_arguments=family.sample_arguments,
            timestep_arguments=family.timestep_arguments,
        )
        call, _ = form._split(args, kwargs)
        completed = {
            "masks": {name: of for name, of in family.masks.items() if name in call.template["kwargs"]},
            "arguments": call.template["kwargs"],
            "inputs": (SAMPLE, TIMESTEP, *call.tensors),
            "booleans": tuple(name for name, tensor in call.tensors.items() if tensor.dtype == torch.bool),
        }
        return form.model_copy(update=completed)

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the graph's inputs for a call, by name and in order, on the CPU, in float32, int64 or bool.

        Raises:
            InputError: The call differs in more than its tensors from the call that the graph was made from.
        """
        call, timesteps = self._split(args, kwargs)
        arguments = call.template["kwargs"]
        if arguments != self.arguments:
            raise InputError(f"{self.denoiser} is called with {_difference(arguments, self.arguments)}.")
        given = {SAMPLE: call.sample, TIMESTEP: timesteps, **call.tensors}
        tensors = {name: self._in_graph_type(name, given[name]) for name in self.inputs}
        rows = tensors[SAMPLE].shape[0]
        if self.rows is not None and rows != self.rows:
            raise InputError(f"{self.denoiser} is called with {rows} rows, but its graph was made for {self.rows}.")
        changed = [name for name, digest in self.fixed.items() if _digest(tensors[name]) != digest]
        if changed:
            raise InputError(
                f"{self.denoiser} is called with other values of {changed[0]} than those that its graph was made for."
            )
        return tensors

    def _in_graph_type(self, name: str, tensor: Tensor) -> Tensor:
        """Returns an input on the CPU, in the element type that it has in the graph."""
        if name in self.booleans:
            return tensor.detach().to("cpu", torch.bool)
        return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64)

    def call(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the keyword arguments of the denoiser that correspond to inputs of the graph."""
        template = {"args": [], "kwargs": self.arguments}
        return build_call(template, tensors[SAMPLE], tensors[TIMESTEP], tensors)[1]

    def output(self, prediction: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the output that the denoiser itself would return, on the device and in the type of the call's sample.

        Raises:
            InputError: The class of that output does not belong to diffusers, to this package or to a package that
                brings a family of denoisers.
        """
        sample = self._split(args, kwargs)[0].sample
        prediction = prediction.to(sample.device, sample.dtype)
        returned = list(prediction) if self.returns_list else prediction
        if self.returns is None or not kwargs.get(_RETURN_DICT, True):
            return (returned,)
        module, _, name = self.returns.rpartition(".")
        if module.partition(".")[0] not in {*_OUTPUT_LIBRARIES, *trusted_packages()}:
            raise InputError(
                f"The engine's files name the output class '{self.returns}', which belongs neither to diffusers nor to"
                " a package with a family of denoisers."
            )
        return getattr(import_module(module), name)(sample=returned)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[DenoiserCall, Tensor]:
        """Returns a call as tensors and other arguments, and one timestep per row of its sample, `(R,)`."""
        bound = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        bound.pop(_RETURN_DICT, None)
        # arguments that are None are omitted, because only some pipelines pass them
        bound = {name: value for name, value in bound.items() if value is not None}
        for name, states in self.masks.items():
            if name not in bound and isinstance(bound.get(states), Tensor):
                bound[name] = torch.ones(bound[states].shape[:2], dtype=torch.int64)
        timesteps = torch.zeros(())
        for name in self.timestep_arguments:
            if isinstance(bound.get(name), Tensor | int | float):
                # rows may have different timesteps here, but not in a recorded call
                timesteps = torch.as_tensor(bound[name], dtype=torch.float32)
                bound[name] = torch.zeros_like(timesteps) if timesteps.numel() else torch.zeros(())  # without rows
        call = split_arguments(self.denoiser, self._argument_names(), {}, bound)
        rows = call.sample.shape[0]
        if rows == 0:  # OpenVINO 2026.4 ends the process
            raise InputError("The denoiser is called without rows, and its graph needs at least one.")
        return replace(call, template=per_row(call.template, rows)), _one_per_row(timesteps, rows)

    def _argument_names(self) -> DenoiserFamily:
        """Returns a family that says which arguments are the sample and the timestep, and nothing else."""
        return replace(UNDESCRIBED, sample_arguments=self.sample_arguments, timestep_arguments=self.timestep_arguments)


def class_path(output: Any) -> str | None:
    """Returns the import path of the class that a denoiser returned; `None` for a tuple."""
    return None if isinstance(output, tuple) else f"{type(output).__module__}.{type(output).__name__}"


def _one_per_row(timesteps: Tensor, rows: int) -> Tensor:
    """Returns timesteps `(R,)` from a scalar, from one value per row, or from several equal values per row `(R, *)`.

    Raises:
        InputError: A row has different values.
    """
    if timesteps.ndim > 1 and timesteps.shape[0] == rows:
        timesteps, every = timesteps.flatten(1)[:, 0], timesteps.flatten(1)
        if not bool((every == timesteps[:, None]).all()):
            raise InputError("The denoiser is called with different timesteps in one row, which its graph cannot take.")
    return timesteps.reshape(-1).expand(rows)


def _difference(arguments: Mapping[str, Any], template: Mapping[str, Any]) -> str:
    """Returns words that describe the first difference between the arguments of two calls."""
    given, expected = _by_dotted_name(arguments), _by_dotted_name(template)
    name = min(key for key in given.keys() | expected.keys() if given.get(key) != expected.get(key))
    shown = _MARKS.sub("", name)
    if name not in expected:
        return f"'{shown}', but its graph was made for calls without it"
    if name not in given:
        return f"no '{shown}', but its graph was made for calls with it"
    return f"{shown} = {given[name]}, but its graph was made for {expected[name]}"


def _by_dotted_name(node: Any, name: str = "") -> dict[str, Any]:
    """Returns the values of a template by dotted name."""
    if isinstance(node, Mapping) and not is_tensor(node):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return {name: "a tensor" if isinstance(node, Mapping) else node}
    return {
        key: leaf for part, item in items for key, leaf in _by_dotted_name(item, f"{name}.{part}".lstrip(".")).items()
    }


def _digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's shape and values."""
    values = tensor.contiguous().numpy().tobytes()
    return sha256(repr(list(tensor.shape)).encode() + values).hexdigest()
