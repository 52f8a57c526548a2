"""All families: those of this package, and those that other installed packages register.

Another package adds a family by an entry point of the group `edadm.families` whose object is a `DenoiserFamily` or a
sequence of them, or by a call of `register`. Its families come before those of this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.families import dit, flux, hidream, lumina2, others, sd3, unet, z_image
from edadm_cli.models.families.family import UNDESCRIBED, DenoiserFamily

GROUP = "edadm.families"
_MODULES = (unet, dit, sd3, flux, lumina2, z_image, hidream, others)
_SHIPPED: tuple[DenoiserFamily, ...] = tuple(family for module in _MODULES for family in module.FAMILIES)
_registered: list[DenoiserFamily] = []


def register(family: DenoiserFamily) -> None:
    """Adds a family; it comes before all families that are there."""
    _registered.insert(0, family)


def families() -> tuple[DenoiserFamily, ...]:
    """Returns all families, those that decide first in front."""
    return (*_registered, *_from_packages(), *_SHIPPED)


def family_of(denoiser: nn.Module) -> DenoiserFamily:
    """Returns the family of a denoiser, or `UNDESCRIBED`: that of its class, else that of the nearest base class."""
    for cls in type(denoiser).__mro__:
        for family in families():
            if cls.__name__ in family.denoisers:
                return family
    return UNDESCRIBED


def prepare_calls(denoiser: nn.Module) -> None:
    """Makes all calls of a denoiser alike, where its family knows how; see `DenoiserFamily.prepare`."""
    prepare = family_of(denoiser).prepare
    if prepare is not None:
        prepare(denoiser)


def trusted_packages() -> frozenset[str]:
    """Returns the top-level packages that registered families: the user installed them, so their classes are loaded."""
    return frozenset(point.module.partition(".")[0] for point in _points())


def float32_pipelines() -> frozenset[str]:
    """Returns the names of the pipelines that sample in float32 only."""
    return frozenset(name for family in families() for name in family.float32_pipelines)


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


@cache
def _from_packages() -> tuple[DenoiserFamily, ...]:
    return tuple(family for point in _points() for family in _load(point))


def _load(point: EntryPoint) -> tuple[DenoiserFamily, ...]:
    try:
        value: Any = point.load()
    except Exception as error:
        raise InputError(
            f"The family '{point.name}' of another package ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    group = [*value] if isinstance(value, Iterable) else [value]
    if not group or not all(isinstance(family, DenoiserFamily) for family in group):
        raise InputError(
            f"The entry point '{point.name}' of the group {GROUP} ({point.value}) is a {type(value).__name__}; "
            "a DenoiserFamily or a sequence of them is expected."
        )
    return tuple(group)
