"""Represents a call of the denoiser as data.

A pipeline calls its denoiser with a noisy sample, a timestep, and further inputs of the architecture: text states,
pooled embeddings inside nested dictionaries, class labels, flags. `split_call` splits such a call into

- the sample, with shape `(R, *)`, where `R` counts rows (images times guidance branches),
- the timestep, one value,
- a flat mapping from dotted names to tensors: those whose first dimension is `R` are the condition, the
  others are constants of the architecture (position ids),
- a template, plain JSON, with the position of each tensor and the literal values of everything else,

and `build_call` builds a call from these parts again, for any rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import family_of

SAMPLE = "sample"
TIMESTEP = "timestep"
_MARK = "$"
_NAMES_SHOWN = 8  # of a call's arguments in a message
_NAMING_MARKS = (_MARK + "tensor", _MARK + "joined", _MARK + "rows_second", _MARK + "complex")
_TENSOR_MARKS = (_MARK + SAMPLE, _MARK + TIMESTEP, _MARK + "tensor")

Template = dict[str, Any]
"""`{"args": [...], "kwargs": {...}, "constants": [names], "dtypes": {name: dtype}}`. A one-entry object whose
key starts with `$` is a place (`{"$tensor": name}`, `{"$sample": null}`, `{"$timestep": null}`, or `{"$timestep": [4]}`
for a timestep with four equal values per row), a tuple
(`{"$tuple": [...]}`), a list of the rows of a tensor (`{"$rows": place}`), a list with one equal item per row
(`{"$each": item}`), a list of rows of different length (`{"$ragged": name}`: they are padded with zeros, and the tensor
`name.lengths` holds the length of each), a tensor with several entries per row in its first dimension
(`{"$joined": name}`, which is stored as `(R, entries, *)`), a tensor whose second dimension counts the rows
(`{"$rows_second": name}`, which is stored as `(R, first, *)`), or a tensor of complex numbers (`{"$complex": name}`,
whose real and imaginary parts are stored in a last dimension of 2)."""


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
    sample_name, timestep_name = _special_names(denoiser, [*names, *kwargs])
    bound = {**dict(zip(names, args, strict=True)), **kwargs}
    sample, is_list = _batched(bound[sample_name])
    if sample is None:
        raise InputError(f"{type(denoiser).__name__} was not called with a batched sample, so it cannot be recorded.")
    rows, family = sample.shape[0], family_of(denoiser)
    missing_masks = {
        name: torch.ones(bound[states].shape[:2], dtype=torch.int64, device=sample.device)
        for name, states in family.masks.items()
        if name in bound and bound[name] is None and isinstance(bound.get(states), Tensor)
    }

    tensors: dict[str, Tensor] = {}

    def encode_argument(name: str, value: Any) -> Any:
        if name == sample_name:
            return {_MARK + "rows": {_MARK + SAMPLE: None}} if is_list else {_MARK + SAMPLE: None}
        if name == timestep_name:
            has_rows = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows
            return {_MARK + TIMESTEP: list(value.shape[1:]) if has_rows else None}
        if is_list and _is_ragged(value, rows):
            return _encode_rows(name, value, tensors)
        if name in family.joined_arguments and isinstance(value, Tensor) and _is_joined(value, rows):
            tensors[name] = value.detach().unflatten(0, (rows, -1))
            return {_MARK + "joined": name}
        if name in family.rows_second and isinstance(value, Tensor) and value.shape[1:2] == (rows,):
            tensors[name] = value.detach().transpose(0, 1)
            return {_MARK + "rows_second": name}
        return _encode(name, missing_masks.get(name, value), tensors)

    template: Template = {
        "args": [encode_argument(name, value) for name, value in zip(names, args, strict=True)],
        "kwargs": {name: encode_argument(name, value) for name, value in kwargs.items()},
    }
    template["constants"] = sorted(
        name for name, t in tensors.items() if name in family.shared_arguments or t.ndim == 0 or t.shape[0] != rows
    )
    template["dtypes"] = {name: _dtype_name(tensor) for name, tensor in sorted(tensors.items())}
    return DenoiserCall(sample, _one_timestep(bound[timestep_name]), tensors, template)


def build_call(
    template: Template, sample: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Builds a call from a template; the inverse of `split_call`.

    Args:
        template: A template from `split_call`.
        sample: The sample, with shape `(R, *)`.
        timestep: A scalar, or one value per row with shape `(R,)`.
        tensors: Condition (with `R` rows) and constants by dotted name.

    Returns:
        `(args, kwargs)` for the denoiser.
    """

    def timestep_of(shape: list[int] | None) -> Tensor:
        if not shape:
            return timestep
        return timestep.reshape(-1, *[1] * len(shape)).expand(sample.shape[0], *shape)

    def decode(node: Any) -> Any:
        if isinstance(node, list):
            return [decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            key, value = next(iter(node.items()))
            if key == "$sample":
                return sample
            if key == "$timestep":
                return timestep_of(value)
            if key == "$tensor":
                return tensors[value]
            if key == "$tuple":
                return tuple(decode(item) for item in value)
            if key == "$rows":
                return list(decode(value))
            if key == "$joined":
                return tensors[value].flatten(0, 1)
            if key == "$complex":
                return torch.view_as_complex(tensors[value].float().contiguous())
            if key == "$rows_second":
                return tensors[value].transpose(0, 1)
            if key == "$ragged":
                lengths = tensors[_lengths(value)].tolist()
                return [row[:length] for row, length in zip(tensors[value], lengths, strict=True)]
            if key == "$each":
                return [decode(value) for _ in range(sample.shape[0])]
        return {key: decode(value) for key, value in node.items()}

    return tuple(decode(item) for item in template["args"]), {k: decode(v) for k, v in template["kwargs"].items()}


def per_row(template: Template, rows: int) -> Template:
    """Returns a template in which a list that repeats one item for each row of the batch becomes the item, as `$each`.

    Pipelines pass sizes of images in this way. As literals, they would differ between batches of different size.

    Args:
        template: A template from `split_call`.
        rows: Rows of the sample.
    """

    def shortened(value: Any) -> Any:
        is_per_row = isinstance(value, list) and len(value) == rows and all(item == value[0] for item in value)
        is_plain = is_per_row and isinstance(value[0], list | dict) and not placed_tensors(value[0])
        return {_MARK + "each": value[0]} if is_plain else value

    kwargs = {name: shortened(value) for name, value in template["kwargs"].items()}
    return {**template, "kwargs": kwargs}


def flat_tensors(value: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in flat_tensors(item)]


def is_tensor(node: Any) -> bool:
    """Returns whether a node of a template stands for a tensor."""
    return isinstance(node, Mapping) and len(node) == 1 and next(iter(node)) in _TENSOR_MARKS


def placed_tensors(node: Any) -> set[str]:
    """Returns the names of the tensors in a template or a part of it, besides sample and timestep.

    Raises:
        ValueError: A tensor has no name, a timestep no shape, or a tuple no items.
    """
    if isinstance(node, list):
        return set().union(*(placed_tensors(item) for item in node))
    if not isinstance(node, dict):
        return set()
    for mark in _NAMING_MARKS if len(node) == 1 else ():
        if mark in node:
            if not isinstance(node[mark], str):
                raise ValueError("the name of a tensor is not a text")
            return {node[mark]}
    ragged = node.get(_MARK + "ragged")
    if len(node) == 1 and ragged is not None:
        if not isinstance(ragged, str):
            raise ValueError("the name of a tensor is not a text")
        return {ragged, _lengths(ragged)}
    if len(node) == 1 and not _is_shape(node.get(_MARK + TIMESTEP)):
        raise ValueError("the shape of a row's timestep is not a list of sizes")
    if len(node) == 1 and not isinstance(node.get(_MARK + "tuple", []), list):
        raise ValueError("a tuple is not a list of items")
    return set().union(*(placed_tensors(item) for item in node.values()))


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


def _special_names(denoiser: nn.Module, given: list[str]) -> tuple[str, str]:
    family = family_of(denoiser)
    sample = next((name for name in family.sample_arguments if name in given), None)
    timestep = next((name for name in family.timestep_arguments if name in given), None)
    if sample is None or timestep is None:
        arguments = ", ".join([*given[:_NAMES_SHOWN], *(["..."] if len(given) > _NAMES_SHOWN else [])])
        raise InputError(
            f"{type(denoiser).__name__} is called with ({arguments}), "
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
    tensors[_lengths(name)] = torch.tensor([len(row) for row in value], device=value[0].device)
    return {_MARK + "ragged": name}


def _lengths(name: str) -> str:
    return f"{name}.lengths"


def _encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        tensors[name] = torch.view_as_real(value.detach())
        return {_MARK + "complex": name}
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_MARK + "tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_MARK + "tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith(_MARK) for key in value):
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


def _is_shape(node: Any) -> bool:
    return node is None or (isinstance(node, list) and all(type(size) is int and size > 0 for size in node))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
