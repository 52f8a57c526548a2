"""Objects that other installed packages add to a registry, found through entry points.

A package names such an object in its own pyproject.toml:

    [project.entry-points."edadm.metrics"]
    sharpness = "my_package.sharpness:Sharpness"
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar, cast

from edadm_cli.errors import MachineError

T = TypeVar("T")


def load_plugins(group: str, kind: Callable[..., T]) -> list[T]:
    """Loads the objects of an entry-point group, in the order of their names.

    Args:
        group: Name of the group, such as `edadm.metrics`.
        kind: The class of the objects; an entry point names an object of it, or a subclass without constructor
            arguments.

    Raises:
        MachineError: An entry point cannot be loaded, or names something else.
    """
    plugins: list[T] = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            plugin = entry.load()
            plugin = plugin() if isinstance(plugin, type) else plugin
        except Exception as error:  # whatever the other package raises
            raise MachineError(
                f"'{entry.name}' of the entry-point group {group} ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}.",
                hint="update or uninstall the package that adds it",
            ) from error
        expected = cast("type[T]", kind)  # mypy allows no abstract class where `type[T]` is expected
        if not isinstance(plugin, expected):
            raise MachineError(
                f"'{entry.name}' of the entry-point group {group} ({entry.value}) is no {expected.__name__}."
            )
        plugins.append(plugin)
    return plugins
