"""Represents a call of the denoiser as data.

A pipeline calls its denoiser with a noisy sample, a timestep, and further inputs of the architecture: text states,
pooled embeddings inside nested dictionaries, class labels, flags. `split_call` splits such a call into

- the sample, with shape `(R, *)`, where `R` counts rows (images times guidance branches),
- the timestep, one value,
- a flat mapping from dotted names to tensors: those whose first dimension is `R` are the condition, the
  others are constants of the architecture (position ids),
- a template, plain JSON, with the position of each tensor and the literal values of everything else,

and `call_templates.build_call` builds a call from these parts again, for any rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.call_templates import MARK, SAMPLE, TIMESTEP, Template, lengths_name
from edadm_cli.models.families import DenoiserFamily, family_of

_NAMES_SHOWN = 8  # of a call's arguments in a message


@dataclass(frozen=True)
class DenoiserCall:
    """The parts of one call of a denoiser.

    Attributes:
        sample: The noisy sample that the denoiser receives, with shape `(R, *)`.
        timestep: The timestep, a scalar tensor, int64 or float32.
        tensors: Condition and constants by dotted name.
        template: The position of every part; see `Template`.
    """

    sample: Tensor
    timestep: Tensor
    tensors: dict[str, Tensor]
    template: Template

    @property
    def condition(self) -> dict[str, Tensor]:
        """The tensors that have one row for each row of the sample."""
        return {name: t for name, t in self.tensors.items() if name not in self.template["constants"]}

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors that are the same for every row."""
        return {name: self.tensors[name] for name in self.template["constants"]}

    def copied(self) -> DenoiserCall:
        """Returns a call whose values stay the same if the pipeline writes into its tensors later."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return DenoiserCall(self.sample.clone(), self.timestep.clone(), tensors, self.template)


def split_call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserCall:
    """Splits one call of `denoiser` into its parts.

    Raises:
        InputError: There is no sample or timestep in the call, the timestep differs between rows, or an
            argument is neither a tensor nor plain data.
    """
    names = _positional_names(denoiser, len(args))
    return split_arguments(type(denoiser).__name__, family_of(denoiser), dict(zip(names, args, strict=True)), kwargs)


def split_arguments(
    denoiser: str, family: DenoiserFamily, args: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> DenoiserCall:
    """Splits one call into its parts, where only its arguments are known and not the denoiser.

    Args:
        denoiser: The name of the denoiser's class, for messages.
        family: The family that says what the arguments are.
        args: The positional arguments, by name and in order.
        kwargs: The keyword arguments.

    Raises:
        InputError: As `split_call`.
    """
    bound = {**args, **kwargs}
    sample_name, timestep_name = _special_names(denoiser, family, list(bound))
    sample, is_list = _batched(bound[sample_name])
    if sample is None:
        raise InputError(f"{denoiser} was not called with a batched sample, so it cannot be recorded.")
    masks = _missing_masks(family, bound, sample.device)
    encoding = _Encoding(family, sample.shape[0], is_list, sample_name, timestep_name, masks)
    template: Template = {
        "args": [encoding.argument(name, value) for name, value in args.items()],
        "kwargs": {name: encoding.argument(name, value) for name, value in kwargs.items()},
    }
    template["constants"] = encoding.constants()
    template["dtypes"] = {name: _dtype_name(tensor) for name, tensor in sorted(encoding.tensors.items())}
    return DenoiserCall(sample, _one_timestep(bound[timestep_name]), encoding.tensors, template)


@dataclass(frozen=True)
class _Encoding:
    """Encodes the arguments of one call as JSON, and collects their tensors.

    Attributes:
        family: The family of the denoiser.
        rows: The number of rows of the sample.
        is_list: Whether the sample is a list of rows.
        sample: The name of the argument that is the sample.
        timestep: The name of the argument that is the timestep.
        masks: What takes the place of arguments that are `None`.
        tensors: The tensors of the arguments so far, by dotted name.
    """

    family: DenoiserFamily
    rows: int
    is_list: bool
    sample: str
    timestep: str
    masks: Mapping[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def argument(self, name: str, value: Any) -> Any:
        """Returns the JSON of an argument."""
        if name == self.sample:
            return {MARK + "rows": {MARK + SAMPLE: None}} if self.is_list else {MARK + SAMPLE: None}
        if name == self.timestep:
            has_rows = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self.rows
            return {MARK + TIMESTEP: list(value.shape[1:]) if has_rows else None}
        if self.is_list and _is_ragged(value, self.rows):
            return _encode_rows(name, value, self.tensors)
        if name in self.family.joined_arguments and isinstance(value, Tensor) and _is_joined(value, self.rows):
            self.tensors[name] = value.detach().unflatten(0, (self.rows, -1))
            return {MARK + "joined": name}
        if name in self.family.rows_second and isinstance(value, Tensor) and value.shape[1:2] == (self.rows,):
            self.tensors[name] = value.detach().transpose(0, 1)
            return {MARK + "rows_second": name}
        return _encode(name, self.masks.get(name, value), self.tensors)

    def constants(self) -> list[str]:
        """Returns the names of the tensors that do not have one row for each row of the sample."""
        shared = self.family.shared_arguments
        return sorted(
            name
            for name, tensor in self.tensors.items()
            if name.partition(".")[0] in shared or tensor.ndim == 0 or tensor.shape[0] != self.rows
        )


def _missing_masks(family: DenoiserFamily, bound: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Returns masks of ones for the arguments that are `None` in a call, where the states that they mask are there."""
    return {
        name: torch.ones(bound[states].shape[:2], dtype=torch.int64, device=device)
        for name, states in family.masks.items()
        if name in bound and bound[name] is None and isinstance(bound.get(states), Tensor)
    }


def flat_tensors(value: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in flat_tensors(item)]


@contextmanager
def record_calls(denoiser: nn.Module, on_call: Callable[[DenoiserCall], None]) -> Iterator[None]:
    """Passes the parts of each call of `denoiser` to `on_call` before it runs, while entered.

    A denoiser on an engine refers to the original module, whose signature gives the names of the arguments.
    """
    described: nn.Module = getattr(denoiser, "stands_for", denoiser)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_call(split_call(described, args, kwargs))

    with Hooks() as hooks:
        hooks.before(denoiser, hook, with_kwargs=True)
        yield


def _positional_names(denoiser: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(denoiser.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]


def _special_names(denoiser: str, family: DenoiserFamily, given: list[str]) -> tuple[str, str]:
    """Returns the names of the arguments that are the sample and the timestep."""
    sample = next((name for name in family.sample_arguments if name in given), None)
    timestep = next((name for name in family.timestep_arguments if name in given), None)
    if sample is None or timestep is None:
        arguments = ", ".join([*given[:_NAMES_SHOWN], *(["..."] if len(given) > _NAMES_SHOWN else [])])
        raise InputError(
            f"{denoiser} is called with ({arguments}), "
            "in which no sample and timestep are recognised, so it cannot be calibrated."
        )
    return sample, timestep


def _batched(sample: Any) -> tuple[Tensor | None, bool]:
    """Returns a sample with one row per image, and whether it was a list of rows; `None` if it is neither."""
    if isinstance(sample, Tensor):
        return (sample, False) if sample.ndim >= 2 else (None, False)
    is_list = isinstance(sample, list) and bool(sample) and all(isinstance(row, Tensor) for row in sample)
    if not is_list or len({row.shape for row in sample}) != 1:
        return None, False
    return torch.stack(sample), True


def _is_joined(value: Tensor, rows: int) -> bool:
    """Returns whether a tensor has several entries per row in its first dimension."""
    return value.ndim >= 2 and value.shape[0] > rows and value.shape[0] % rows == 0


def _is_ragged(value: Any, rows: int) -> bool:
    """Returns whether a value is a list of one tensor per row, which may differ in their first dimension."""
    is_list = isinstance(value, list) and len(value) == rows and all(isinstance(row, Tensor) for row in value)
    return is_list and len({row.shape[1:] for row in value}) == 1 and value[0].ndim >= 1


def _encode_rows(name: str, value: list[Tensor], tensors: dict[str, Tensor]) -> Any:
    tensors[name] = nn.utils.rnn.pad_sequence([row.detach() for row in value], batch_first=True)
    tensors[lengths_name(name)] = torch.tensor([len(row) for row in value], device=value[0].device)
    return {MARK + "ragged": name}


def _encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns the JSON of a value, and adds the tensors in it to `tensors` by dotted name.

    Raises:
        InputError: The value is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor) and value.is_complex():
        tensors[name] = torch.view_as_real(value.detach())
        return {MARK + "complex": name}
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {MARK + "tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {MARK + "tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith(MARK) for key in value):
        return {key: _encode(f"{name}.{key}", item, tensors) for key, item in value.items()}
    raise InputError(
        f"The denoiser is called with {name} of type {type(value).__name__}, which cannot be stored as data."
    )


def _one_timestep(value: Any) -> Tensor:
    timestep = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
    timestep = timestep.to(torch.float32 if timestep.is_floating_point() else torch.int64).reshape(-1)
    if timestep.numel() == 0 or not bool((timestep == timestep[0]).all()):
        raise InputError("The denoiser is called with different timesteps in one batch, which cannot be calibrated.")
    return timestep[0]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
