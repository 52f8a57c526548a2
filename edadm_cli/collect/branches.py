"""Separates the two guidance branches of one step, which are rows of one call or two calls.

Pipelines apply guidance in one of two ways: they double the rows of one call, or they call the denoiser twice with the
same sample, first with the prompt and then without it. Both are stored alike, as one condition per branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_cli.models.denoiser_calls.calls import DenoiserCall

FORM = "the form of the call"
"""Stands for everything but the tensors of a call in what `difference` and `differences` return."""

SplitRows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns the rows of a tensor that belong to the branch without the prompt, and those of the branch with it."""


@dataclass(frozen=True)
class Conditions:
    """The tensors of a step other than its sample, by dotted name.

    Attributes:
        conditional: The tensors of the branch with the prompt, with one row per trajectory.
        unconditional: The tensors of the branch without the prompt; empty without guidance.
        constants: Tensors that all rows share.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor]
    constants: dict[str, Tensor]


def are_branches(one: DenoiserCall, other: DenoiserCall) -> bool:
    """Returns whether two successive calls are the branches of one step, with equal sample and timestep."""
    same_input = torch.equal(one.timestep, other.timestep) and equal(one.sample, other.sample)
    return same_input and difference(one, other) is not None


def difference(call: DenoiserCall, other: DenoiserCall) -> str | None:
    """Returns the first of the `differences` of two calls; `None` if there is none."""
    return next(iter(differences(call, other)), None)


def differences(call: DenoiserCall, other: DenoiserCall) -> list[str]:
    """Returns the names of the tensors that differ in two calls, apart from sample and timestep.

    `FORM` is among them if the calls differ in anything else, such as a flag or the shape of the sample.
    """
    changed = [name for name, tensor in call.tensors.items() if not equal(tensor, other.tensors.get(name))]
    if call.template != other.template or call.sample.shape != other.sample.shape:
        changed.append(FORM)
    return changed


def of_rows(call: DenoiserCall, branches: int, split: SplitRows) -> Conditions:
    """Returns the conditions of one call that holds all branches.

    Args:
        call: The call.
        branches: 2 with guidance, else 1.
        split: Splits the rows of the call by branch.
    """
    pairs = {name: split(tensor) for name, tensor in call.condition.items()}
    conditional = {name: storable(pair[1]) for name, pair in pairs.items()}
    unconditional = {name: storable(pair[0]) for name, pair in pairs.items()} if branches == 2 else {}
    return Conditions(conditional, unconditional, {name: storable(t) for name, t in call.constants.items()})


def of_calls(first: DenoiserCall, second: DenoiserCall, masks: Mapping[str, str]) -> Conditions | str:
    """Returns the conditions of a step of two calls, the one with the prompt first.

    Prompts of different length are padded with zeros if there is a mask, which hides the padding from the model.

    Args:
        first: The call with the prompt.
        second: The call without it.
        masks: Mask arguments with the arguments that they mask; see `DenoiserFamily`.

    Returns:
        The conditions, or the name of a tensor that cannot be stored for both branches.
    """
    padded = {name for mask, states in masks.items() if mask in first.condition for name in (mask, states)}
    padded |= {name.removesuffix(".lengths") for name in first.condition if name.endswith(".lengths")}
    if first.template != second.template:
        return FORM
    conditional, unconditional = {}, {}
    for name, tensor in first.condition.items():
        other = second.condition[name]
        if tensor.shape != other.shape:
            if name not in padded:
                return name
            length = max(tensor.shape[1], other.shape[1])
            tensor, other = pad(tensor, length), pad(other, length)
        conditional[name], unconditional[name] = storable(tensor), storable(other)
    for name, tensor in first.constants.items():
        if not equal(tensor, second.constants.get(name)):
            return name
    return Conditions(conditional, unconditional, {name: storable(t) for name, t in first.constants.items()})


def pad(tensor: Tensor, length: int) -> Tensor:
    """Returns a tensor `[n, L, *]` with zeros up to `[n, length, *]`."""
    return F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, length - tensor.shape[1]])


def storable(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy on the CPU."""
    return tensor.cpu().clone()


def equal(tensor: Tensor | None, other: Tensor | None) -> bool:
    """Returns whether two tensors have the same shape and values."""
    return tensor is not None and other is not None and tensor.shape == other.shape and torch.equal(tensor, other)
