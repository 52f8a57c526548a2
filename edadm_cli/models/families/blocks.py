"""Finds the blocks of a denoiser and its middle block, by its family or by the structure of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.families.family import DenoiserFamily, UnitKind
from edadm_cli.models.families.layers import is_weighted
from edadm_cli.models.families.registry import family_of

_LAYERS_PER_BLOCK = 2  # a list whose modules have fewer layers each is not a list of blocks


def block_kinds(denoiser: nn.Module) -> Mapping[str, UnitKind]:
    """Returns the class names of the blocks of a denoiser, with the kind of unit that each makes.

    The family names the classes. If it does not, the classes are those of diffusers' `_repeated_blocks` that the model
    has modules of. If there are none, they are the classes of the model's module lists whose members all have one class
    and hold several layers each.
    """
    family = family_of(denoiser)
    if family.blocks is not None:
        return family.blocks
    classes = {type(module).__name__ for module in denoiser.modules()}
    repeated = [name for name in getattr(denoiser, "_repeated_blocks", None) or () if name in classes]
    names = repeated or sorted({type(modules[0]).__name__ for _, modules in _repeated_lists(denoiser)})
    return dict.fromkeys(names, "transformer")


def outermost_blocks(denoiser: nn.Module) -> dict[str, UnitKind]:
    """Returns the kind of each block that lies in no other block, by the block's name in the denoiser."""
    kinds = block_kinds(denoiser)
    blocks: dict[str, UnitKind] = {}
    for name, module in denoiser.named_modules():  # parents come before their children
        kind = kinds.get(type(module).__name__)
        if kind is not None and name and not any(name.startswith(block + ".") for block in blocks):
            blocks[name] = kind
    return blocks


def middle_module(denoiser: nn.Module) -> nn.Module:
    """Returns the module whose input is the mid-block feature.

    For a UNet this is the attention of the mid-block. A mid-block without attention gives its second residual block,
    and a UNet without a mid-block gives the last block of its down path. For a transformer it is the middle block of
    the list that the family names, or else of the longest list of blocks.

    Raises:
        InputError: The network has none of these.
    """
    lists = _named_lists(denoiser, family_of(denoiser))
    if lists:
        return lists[0][len(lists[0]) // 2]
    middle = getattr(denoiser, "mid_block", None)
    candidates: list[Any] = [
        *list(getattr(middle, "attentions", None) or [])[:1],
        *list(getattr(middle, "resnets", None) or [])[1:2],
        middle,
        *list(getattr(denoiser, "down_blocks", None) or [])[-1:],
    ]
    module = next((module for module in candidates if isinstance(module, nn.Module)), None)
    if module is not None:
        return module
    longest = max((modules for _, modules in _block_lists(denoiser)), key=len, default=None)
    if longest is None:
        raise InputError(
            f"{type(denoiser).__name__} has neither a mid-block nor a list of blocks, so there is no feature map that "
            "distinguishes its steps, and it cannot be calibrated.",
            hint="a family that names its blocks: docs/models.md, 'Describe a denoiser'",
        )
    return longest[len(longest) // 2]


def _named_lists(denoiser: nn.Module, family: DenoiserFamily) -> list[nn.ModuleList]:
    lists = (getattr(denoiser, name, None) for name in family.block_lists)
    return [modules for modules in lists if isinstance(modules, nn.ModuleList) and len(modules) > 0]


def _block_lists(denoiser: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yields the name of each list whose members are all blocks of the denoiser, with the list."""
    kinds = block_kinds(denoiser)
    for name, modules in denoiser.named_modules():
        is_list = isinstance(modules, nn.ModuleList) and len(modules) > 0
        if is_list and all(type(module).__name__ in kinds for module in modules):
            yield name, modules


def _repeated_lists(denoiser: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yields the outermost lists of at least two modules that have one class and several layers each, with names."""
    outer: list[str] = []
    for name, modules in denoiser.named_modules():
        if not isinstance(modules, nn.ModuleList) or len(modules) < 2:
            continue
        if any(name.startswith(other + ".") for other in outer):
            continue
        layers = sum(is_weighted(module) for module in modules[0].modules())
        if len({type(module) for module in modules}) == 1 and layers >= _LAYERS_PER_BLOCK:
            outer.append(name)
            yield name, modules
