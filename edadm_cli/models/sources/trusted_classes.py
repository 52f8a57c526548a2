"""Imports the classes that a pipeline's index names, from trusted libraries only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from edadm_cli.errors import InputError
from edadm_cli.models.families.registry import trusted_packages
from edadm_cli.models.sources.files import INDEX_NAME

_LIBRARIES = ("diffusers", "transformers", "edadm_cli")
_OWN_MODULES = "edadm_cli.models."


def class_of(root: Path, library: str, class_name: str) -> type:
    """Returns the class that the index of a folder names.

    Args:
        root: The folder, for messages.
        library: A trusted library or one of its modules, or a package of diffusers' pipelines.
        class_name: The name of the class.

    Raises:
        InputError: The library is not trusted, or it has no such class.
    """
    if _is_trusted(library):
        try:
            module: Any = importlib.import_module(library)
            getattr(module, class_name, None)  # a library may import the class only now
        except Exception:  # noqa: BLE001 - a part of the library that cannot be imported here
            module = None
    else:
        module = _pipeline_package(root, library, class_name)
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise InputError(
            f"{root / INDEX_NAME} asks for {library[:80]}.{class_name[:80]}, which the installed"
            f" {library.partition('.')[0][:80]} does not have."
        )
    return cls


def _is_trusted(library: str) -> bool:
    """Returns whether a library, or the library of a module, is one whose code is run; private modules are not."""
    parts = library.split(".")
    if any(not part.isidentifier() or part.startswith("_") for part in parts):
        return False
    if parts[0] == "edadm_cli":
        return library.startswith(_OWN_MODULES)
    return parts[0] in {*_LIBRARIES, *trusted_packages()}


def _pipeline_package(root: Path, library: str, class_name: str) -> Any:
    """Returns the package of diffusers' pipelines that an index names in place of a library."""
    from diffusers import pipelines

    module = getattr(pipelines, library, None) if library.isidentifier() else None
    if not getattr(module, "__name__", "").startswith("diffusers.pipelines."):
        raise InputError(
            f"{root / INDEX_NAME} asks for {library[:80]}.{class_name[:80]}; "
            f"only classes of {', '.join(_LIBRARIES)} are loaded, so that no foreign code runs."
        )
    return module
