"""Merges the recordings of batches of trajectories, also if the pipeline pads prompts differently in each batch.

Many pipelines pad prompts to the longest one of the batch, so that the text states of two batches differ in length. If
there is a mask (1: token, 0: padding), the shorter ones are padded further: states with zeros, the mask with 0.
Pipelines may pass the mask only to batches with padding; a missing or null mask counts as ones. Without any mask,
padding would change the result of the network, and the batches are refused. Instead of a mask, some pipelines pass the
number of tokens per row (`text_lens` of ERNIE-Image).

Mid-block features are padded with zeros, which changes neither the order of the distances between steps nor, once
they are normalised, the scores of TDAC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import TensorInfo, load_tensors, read_tensor_header
from edadm_cli.errors import InputError
from edadm_cli.models.collected import CONDITION, CONSTANT, FEATURES, TIMESTEPS, UNCONDITIONAL
from edadm_cli.models.denoiser_calls.calibration import CallForm

_MASK = "mask"  # in the names of conditions that may say which states are padding
_MASK_ENDING = "_mask"  # the mask of `states` is called `states_mask`
_LENGTH_ENDINGS = ("_lens", "_lengths")  # of conditions that may hold the number of tokens per row
_SIZE_HINT = "another --batch-size: one that divides --num-trajectories, or that takes all at once"


@dataclass(frozen=True)
class Batch:
    """The recording of one batch: the form of its calls, and a file with its tensors.

    Attributes:
        form: The form of the denoiser's calls.
        path: The file of the tensors.
        tensors: The types and shapes of the tensors by name.
        index: The number of the batch, for messages.
    """

    form: CallForm
    path: Path
    tensors: Mapping[str, TensorInfo]
    index: int

    @classmethod
    def open(cls, form: CallForm, path: Path, index: int) -> Batch:
        """Reads the header of a batch's file."""
        return cls(form, path, read_tensor_header(path), index)

    @property
    def branches(self) -> list[Branch]:
        """Its conditions, by branch of guidance."""
        prefixes = (CONDITION, UNCONDITIONAL)[: self.form.branches]
        return [Branch(self, prefix) for prefix in prefixes]


@dataclass(frozen=True)
class Branch:
    """The conditions of a batch in one branch of guidance.

    Attributes:
        batch: The batch.
        prefix: The beginning of the names of the conditions in the file.
    """

    batch: Batch
    prefix: str

    def info(self, name: str) -> TensorInfo | None:
        """Returns the type and shape of a condition; `None` if it was not passed."""
        return self.batch.tensors.get(self.prefix + name)

    def length(self, name: str) -> int | None:
        """Returns the size of a condition's dimension 1; `None` if it has none or was not passed."""
        info = self.info(name)
        return None if info is None or len(info.shape) < 2 else info.shape[1]

    def tensor(self, name: str) -> Tensor:
        """Returns a condition."""
        return load_tensors(self.batch.path, [self.prefix + name])[self.prefix + name]


@dataclass(frozen=True)
class Merged:
    """The form and shapes of all batches together.

    Attributes:
        form: The form of the denoiser's calls.
        conditions: The type and shape of one row of each condition, the same in both branches of guidance.
        features: The type and shape of the features of one step and row.
        masks: Maps a mask that may be missing from a batch to the condition whose length it has.
    """

    form: CallForm
    conditions: dict[str, TensorInfo]
    features: TensorInfo
    masks: dict[str, str]


def merge(batches: Sequence[Batch]) -> Merged:
    """Returns the form and the shapes that fit every batch.

    Raises:
        InputError: The batches do not fit together: timesteps, constants, types or the form of the calls differ, or
            lengths differ without a mask.
    """
    _require_equal_tensors(batches)
    branches = [branch for batch in batches for branch in batch.branches]
    form = _common_form(batches, branches)
    masks = _missing_masks(branches, form)
    conditions = {name: _condition(name, branches, masks) for name in form.conditions}
    featured = [(batch.tensors[FEATURES], batch) for batch in batches if FEATURES in batch.tensors]
    features = _common_info(FEATURES, featured, fixed=(0, 2))
    return Merged(form, conditions, TensorInfo(dtype=features.dtype, shape=features.shape[2:]), masks)


def _common_form(batches: Sequence[Batch], branches: Sequence[Branch]) -> CallForm:
    """Returns the form of the batch that passes most tensors, if the others differ from it in null masks only."""
    fullest = max(batches, key=lambda batch: len(batch.form.template.dtypes))
    for batch in batches:
        if not _is_like(batch.form, fullest.form):
            raise InputError(
                f"The denoiser is called differently in batch {batch.index} than in batch {fullest.index} of the"
                " trajectories, so that their calls cannot be put into one set.",
                hint=_SIZE_HINT,
            )
    return _with_masks(fullest.form, branches)


def _is_like(form: CallForm, fullest: CallForm) -> bool:
    """Returns whether a form is the fullest one, except that some of its masks may be null."""
    ours, theirs = form.template, fullest.template
    return (
        (form.branches, form.dtype, ours.args, ours.constants, form.control, form.varying)
        == (fullest.branches, fullest.dtype, theirs.args, theirs.constants, fullest.control, fullest.varying)
        and ours.kwargs.keys() == theirs.kwargs.keys()
        and all(value == theirs.kwargs[name] or _is_null_mask(name, value) for name, value in ours.kwargs.items())
        and ours.dtypes.items() <= theirs.dtypes.items()
    )


def _is_null_mask(name: str, value: Any) -> bool:
    return value is None and name.endswith(_MASK_ENDING)


def _with_masks(form: CallForm, branches: Sequence[Branch]) -> CallForm:
    """Returns the form with a tensor for each null mask of states that differ in length."""
    template = form.template
    kwargs, dtypes = dict(template.kwargs), dict(template.dtypes)
    for name, value in template.kwargs.items():
        states = name.removesuffix(_MASK_ENDING)
        if _is_null_mask(name, value) and len({branch.length(states) for branch in branches}) > 1:
            kwargs[name], dtypes[name] = {"$tensor": name}, "int64"
    changed = template.model_copy(update={"kwargs": kwargs, "dtypes": dict(sorted(dtypes.items()))})
    return form.model_copy(update={"template": changed})


def _missing_masks(branches: Sequence[Branch], form: CallForm) -> dict[str, str]:
    """Returns the masks that some batches lack, each with the condition whose length it has.

    Raises:
        InputError: A condition that some batches lack is not a mask of another one.
    """
    masks = {}
    for name in form.conditions:
        if all(branch.info(name) for branch in branches):
            continue
        states = name.removesuffix(_MASK_ENDING)
        if states == name or any(branch.length(states) is None for branch in branches):
            raise InputError(
                f"The denoiser is given '{name}' in some batches of trajectories only, so that they cannot be put into"
                " one set.",
                hint=_SIZE_HINT,
            )
        masks[name] = states
    return masks


def _require_equal_tensors(batches: Sequence[Batch]) -> None:
    """Raises an `InputError` if timesteps or constants differ between batches."""

    def shared(batch: Batch) -> dict[str, Tensor]:
        names = [name for name in batch.tensors if name == TIMESTEPS or name.startswith(CONSTANT)]
        return load_tensors(batch.path, names)

    first = shared(batches[0])
    for batch in batches[1:]:
        tensors = shared(batch)
        for name in sorted(first.keys() | tensors.keys()):
            one, other = first.get(name), tensors.get(name)
            if one is None or other is None or one.dtype != other.dtype or not torch.equal(one, other):
                raise _differs(f"'{name}'", batch)


def _condition(name: str, branches: Sequence[Branch], masks: Mapping[str, str]) -> TensorInfo:
    """Returns the type and shape of a condition's row, padded to the longest if there is a mask of the lengths."""
    infos = [(info, branch.batch) for branch in branches if (info := branch.info(name)) is not None]
    if not infos:  # a mask that no batch has
        longest = max(branch.length(masks[name]) or 0 for branch in branches)
        return TensorInfo(dtype="I64", shape=(longest,))
    common = _common_info(name, infos, fixed=())
    row = TensorInfo(dtype=common.dtype, shape=common.shape[1:])
    other = next((batch for info, batch in infos if info.shape[1:] != infos[0][0].shape[1:]), None)
    if other is None and name not in masks:
        return row
    if any(info.shape[2:] != row.shape[1:] for info, _ in infos) or not _has_mask(name, branches, masks):
        where = "one batch" if other is None else f"batch {other.index}"
        raise InputError(
            f"The length of '{name}' differs between batches of trajectories (in {where}): the pipeline pads prompts to"
            " the longest of a batch and passes no mask of them, so that the batches cannot be put into one set.",
            hint="a --batch-size that takes all trajectories at once, or --prompts with prompts of one length",
        )
    if name in masks:
        return TensorInfo(dtype=row.dtype, shape=(max(branch.length(masks[name]) or 0 for branch in branches),))
    return row


def _has_mask(name: str, branches: Sequence[Branch], masks: Mapping[str, str]) -> bool:
    """Returns whether the rows' lengths are known: by a mask in every batch, or as numbers."""
    if all(branch.info(f"{name}.lengths") is not None for branch in branches):
        return True
    passed = {key.removeprefix(branch.prefix) for branch in branches for key in branch.batch.tensors}
    candidates = sorted(key for key in passed | masks.keys() if _MASK in key)
    counts = sorted(key for key in passed if key.endswith(_LENGTH_ENDINGS))
    return any(all(_is_mask_of(mask, name, branch, masks) for branch in branches) for mask in candidates) or any(
        _are_lengths_of(count, name, branches) for count in counts
    )


def _is_mask_of(mask: str, name: str, branch: Branch, masks: Mapping[str, str]) -> bool:
    info = branch.info(mask)
    states = masks.get(mask, name) if name == mask else name
    if info is None:
        return mask in masks and branch.length(masks[mask]) == branch.length(states)
    return len(info.shape) == 2 and info.shape[1] == branch.length(states) and _is_right_padded(branch.tensor(mask))


def _are_lengths_of(count: str, name: str, branches: Sequence[Branch]) -> bool:
    """Returns whether a condition has one number per row, and the largest of each batch is the length of `name`."""
    largest: dict[int, int] = {}
    for branch in branches:
        info = branch.info(count)
        if info is None or len(info.shape) != 1 or not info.dtype.startswith("I"):
            return False
        index = branch.batch.index
        largest[index] = max(largest.get(index, 0), int(branch.tensor(count).max()))
    return all(largest[branch.batch.index] == branch.length(name) for branch in branches)


def _is_right_padded(mask: Tensor) -> bool:
    """Returns whether a mask, with shape `(n, L)`, has ones and then zeros in every row."""
    values = mask.to(torch.float32)
    is_binary = bool(((values == 0) | (values == 1)).all())
    return is_binary and bool((values[:, 1:] <= values[:, :-1]).all())


def _common_info(name: str, infos: Sequence[tuple[TensorInfo, Batch]], fixed: Sequence[int]) -> TensorInfo:
    """Returns one type, and the largest extent of each dimension; those in `fixed` have to be equal."""
    if not infos:
        raise InputError(f"No batch of trajectories recorded '{name}'.", hint="edadm collect --force")
    start = infos[0][0]
    for info, batch in infos:
        if info.dtype != start.dtype:
            raise _differs(f"the element type of '{name}'", batch)
        if len(info.shape) != len(start.shape) or any(info.shape[dim] != start.shape[dim] for dim in fixed):
            raise _differs(f"the shape of '{name}'", batch)
    extents = zip(*(info.shape for info, _ in infos), strict=True)
    return TensorInfo(dtype=start.dtype, shape=tuple(max(extent) for extent in extents))


def _differs(what: str, batch: Batch) -> InputError:
    return InputError(
        f"In batch {batch.index} of the trajectories {what} differs from that of other batches, so that they cannot be"
        " put into one set.",
        hint=_SIZE_HINT,
    )
