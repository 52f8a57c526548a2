"""Lists all families: those of this package, and those that other installed packages register.

Another package adds a family by an entry point of the group `edadm.families` whose object is a `DenoiserFamily` or a
sequence of them, or by a call of `register`. Its families come before those of this package. If the families of two
packages describe one class, every command that asks for a family fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint

from torch import nn

from edadm_cli.errors import MachineError
from edadm_cli.models.families import dit, ernie, flux, hidream, lumina2, others, qwen_image21, sd3, unet, z_image
from edadm_cli.models.families.family import UNDESCRIBED, DenoiserFamily
from edadm_cli.plugins import load_object, origin, plugin_points

GROUP = "edadm.families"
_MODULES = (unet, dit, sd3, flux, lumina2, z_image, hidream, qwen_image21, ernie, others)
_SHIPPED: tuple[DenoiserFamily, ...] = tuple(family for module in _MODULES for family in module.FAMILIES)
_registered: list[DenoiserFamily] = []


def register(family: DenoiserFamily) -> None:
    """Adds a family, which takes precedence over all families that exist already."""
    _registered.insert(0, family)


def families() -> tuple[DenoiserFamily, ...]:
    """Returns all families, in order of precedence: registered ones, those of other packages, those of this one."""
    return (*_registered, *_from_packages(), *_SHIPPED)


def family_of(denoiser: nn.Module) -> DenoiserFamily:
    """Returns the family of a denoiser's class, or else of its nearest base class; `UNDESCRIBED` if none has one.

    The family of a denoiser on an engine is that of the denoiser that it stands for.
    """
    for cls in type(getattr(denoiser, "stands_for", denoiser)).__mro__:
        family = family_named(cls.__name__)
        if family is not UNDESCRIBED:
            return family
    return UNDESCRIBED


def family_named(denoiser: str) -> DenoiserFamily:
    """Returns the family that names a class of denoisers; `UNDESCRIBED` if none does."""
    return next((family for family in families() if denoiser in family.denoisers), UNDESCRIBED)


def prepare_calls(denoiser: nn.Module) -> None:
    """Gives all calls of a denoiser one form, in place, if its family says how; see `DenoiserFamily.prepare`."""
    prepare = family_of(denoiser).prepare
    if prepare is not None:
        prepare(denoiser)


def trusted_packages() -> frozenset[str]:
    """Returns the top-level packages whose entry points name families.

    The user installed these packages, so classes of theirs may be loaded.
    """
    return frozenset(point.module.partition(".")[0] for point in _points())


def float32_pipelines() -> frozenset[str]:
    """Returns the names of the pipelines that sample in float32 only."""
    return frozenset(name for family in families() for name in family.float32_pipelines)


def decodes_in_tiles_only(autoencoder: nn.Module | None) -> bool:
    """Returns whether an autoencoder works with tiling turned on only."""
    return any(type(autoencoder).__name__ in family.tiled_autoencoders for family in families())


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(plugin_points(GROUP))


@cache
def _from_packages() -> tuple[DenoiserFamily, ...]:
    """Returns the families of other packages, in the order of their entry points.

    Raises:
        MachineError: An entry point cannot be loaded, or several families describe one class.
    """
    found: list[DenoiserFamily] = []
    origins: dict[str, str] = {}
    for point in _points():
        for family in _load(point):
            for denoiser in family.denoisers:
                if denoiser in origins:
                    raise MachineError(
                        f"Several families of the entry-point group {GROUP} describe the class {denoiser}: "
                        f"{origins[denoiser]} and {origin(point)}.",
                        hint="uninstall the package that adds one of them",
                    )
                origins[denoiser] = origin(point)
            found.append(family)
    return tuple(found)


def _load(point: EntryPoint) -> tuple[DenoiserFamily, ...]:
    value = load_object(point)
    group = [*value] if isinstance(value, Iterable) else [value]
    if not group or not all(isinstance(family, DenoiserFamily) for family in group):
        raise MachineError(
            f"'{point.name}' of the entry-point group {GROUP} ({point.value}) is a {type(value).__name__}; "
            "a DenoiserFamily or a sequence of them is expected."
        )
    return tuple(group)
