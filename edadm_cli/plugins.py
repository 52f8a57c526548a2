"""Objects that other installed packages add to a registry, found through entry points.

A package names such an object in its own pyproject.toml:

    [project.entry-points."edadm.metrics"]
    sharpness = "my_package.sharpness:Sharpness"

Every kind of object has a group and a registry of its own: `edadm.engines`, `edadm.families`, `edadm.metrics`,
`edadm.contenders`, `edadm.transforms` and `edadm.strategies`. All registries load their objects with this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from traceback import walk_tb
from typing import Any, Protocol, TypeVar, cast

from edadm_cli.errors import MachineError, missing_package

KINDS = {
    "edadm.engines": "engine",
    "edadm.families": "family",
    "edadm.metrics": "metric",
    "edadm.contenders": "contender",
    "edadm.transforms": "transform",
    "edadm.strategies": "strategy",
}
"""What the entry points of each group name."""

_LONGEST_SHOWN = 200


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T")
NamedT = TypeVar("NamedT", bound=_Named)


def plugin_points(group: str) -> list[EntryPoint]:
    """Returns the entry points of a group, such as `edadm.metrics`, in the order of their names."""
    return sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


def origin(point: EntryPoint) -> str:
    """Returns the package that adds an entry point and what it names: `my-package (my_package.engine:MyEngine)`."""
    package = point.module.partition(".")[0] if point.dist is None else point.dist.name
    return f"{package} ({point.value})"


def load_object(point: EntryPoint) -> Any:
    """Returns the object that an entry point names; a class or a function is called without arguments.

    Raises:
        MachineError: The object does not exist, or its package cannot be imported.
    """
    what = f"'{point.name}' of the entry-point group {point.group} ({point.value})"
    try:
        value = point.load()
        return value() if callable(value) else value
    except ModuleNotFoundError as error:
        raise missing_package(error, what) from error
    except Exception as error:  # whatever the other package raises
        raise MachineError(
            f"{what} cannot be loaded: {type(error).__name__}: {error}.",
            hint="update or uninstall the package that adds it",
        ) from error


def load_plugin(point: EntryPoint, kind: Callable[..., T]) -> T:
    """Returns the object that an entry point names.

    Args:
        point: The entry point. It names an object of the class, a subclass without constructor arguments, or a
            function without arguments that returns an object.
        kind: The class of the object.

    Raises:
        MachineError: The object cannot be loaded, or is something else.
    """
    plugin, expected = load_object(point), cast("type[T]", kind)  # mypy takes no abstract class for `type[T]`
    if not isinstance(plugin, expected):
        raise MachineError(
            f"'{point.name}' of the entry-point group {point.group} ({point.value}) is no {expected.__name__}."
        )
    return plugin


def with_plugins(shipped: Iterable[NamedT], group: str, kind: Callable[..., NamedT]) -> dict[str, NamedT]:
    """Returns the shipped objects of a registry and those of other packages, by their names.

    Args:
        shipped: The objects of this package, in the order in which they are listed.
        group: The entry-point group of the others.
        kind: The class of the objects.

    Raises:
        MachineError: An entry point cannot be loaded, or its object has a name that is in use already.
    """
    known = {each.name: each for each in shipped}
    origins = dict.fromkeys(known, "edadm itself")
    for point in plugin_points(group):
        plugin = load_plugin(point, kind)
        if plugin.name in known:
            raise same_name(group, plugin.name, [origins[plugin.name], origin(point)])
        known[plugin.name], origins[plugin.name] = plugin, origin(point)
    return known


def same_name(group: str, name: str, origins: Iterable[str]) -> MachineError:
    """Returns the failure of several objects that have one name.

    Args:
        group: The entry-point group.
        name: The name.
        origins: Where the objects come from; see `origin`.
    """
    return MachineError(
        f"Several objects of the entry-point group {group} have the name '{name}': {' and '.join(origins)}.",
        hint="uninstall the package that adds one of them",
    )


def plugin_failure(error: Exception) -> MachineError | None:
    """Returns the failure that is reported for an error that another package's code raised while it ran.

    The error belongs to another package if a frame of its traceback runs one of the package's modules, whether the
    error was raised there or in what the package called.

    Returns:
        One sentence that names the object, such as the engine, and the error; `None` if no other package was running.
        It names several objects if the traceback does not say which of them was running.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    every = [point for group in KINDS for point in plugin_points(group)]
    for frame in reversed(frames):  # the innermost first
        module, owner = str(frame.f_globals.get("__name__")), frame.f_code.co_qualname.partition(".")[0]
        points = [point for point in every if _is_in_package_of(point, module)]
        inside = [point for point in points if point.module == module] or points
        nearest = [point for point in inside if point.attr == owner] or inside
        if nearest:
            names = " or ".join(f"the {KINDS[point.group]} '{point.name}'" for point in nearest)
            what = f"{type(error).__name__}: {error}"
            return MachineError(
                f"{names[0].upper()}{names[1:]} of another package failed in {module}: {what}.",
                hint="add --verbose to see where, and report it to the authors of that package",
            )
    return None


def wrong_result(what: str, plugin: object, result: object, expected: str) -> MachineError:
    """Returns the failure of an object that returned something else than its interface says.

    Args:
        what: The name of the object, such as "The metric 'sharpness'".
        plugin: The object, whose class says which package it belongs to.
        result: The value that it returned.
        expected: What its interface says.
    """
    package = _package_of(plugin)
    return MachineError(
        f"{what} of the package {package} returned {_shown(result)}, where {expected} is expected.",
        hint=f"update or uninstall {package}, or report it to the authors of that package",
    )


def is_of_this_package(plugin: object) -> bool:
    """Returns whether the class of an object belongs to `edadm_cli` and not to another package."""
    return _package_of(plugin) == __name__.partition(".")[0]


def _package_of(plugin: object) -> str:
    return type(plugin).__module__.partition(".")[0]


def _shown(value: object) -> str:
    """Returns the `repr` of a value, or the beginning of a long one; of a large tensor, its type and shape."""
    text = " ".join(repr(value).split())
    if len(text) <= _LONGEST_SHOWN:
        return text
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} with shape {tuple(shape)}"
    return f"{text[:_LONGEST_SHOWN]}..."


def _is_in_package_of(point: EntryPoint, module: str) -> bool:
    """Returns whether a module is that of an entry point, or one of the same package."""
    package = point.module.rpartition(".")[0] or point.module
    return module == package or module.startswith(f"{package}.")
