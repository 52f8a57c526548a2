"""Finds the files of a model: of a known name, a diffusers folder, a checkpoint file, or a hub id."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.architecture import Architecture, load_architecture
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.models.shipped import shipped_folder
from edadm_cli.models.sources.files import INDEX_NAME
from edadm_cli.models.sources.hub import download, looks_like_hub_id

_BY_HAND = {
    "compvis": ("a CompVis checkpoint", "unpack it there"),
    "assembled": (
        "a folder made of several models of the hub",
        "save its pipeline there (docs/models.md, 'Other known names')",
    ),
}
Location = Architecture | tuple[Path, str | None]
"""Where a model is: the architecture of random weights, or a folder or file and its revision on the hub."""


def locate(model: str) -> Location:
    """Finds a model's files; one of the hub is downloaded, or found in the cache.

    Args:
        model: A known name, a diffusers folder, a checkpoint file, or a hub id.

    Raises:
        InputError: There is no such model.
    """
    entry = known_models().get(model)
    if entry is not None and is_random(model, entry):
        return load_architecture(entry.location)
    return files_of(model, entry)


def is_random(model: str, entry: ModelEntry) -> bool:
    """Returns whether a model is known by its name and has random weights."""
    return entry.name == model and entry.source == "random"


def files_of(model: str, entry: ModelEntry | None) -> tuple[Path, str | None]:
    """Returns the folder or file of a model, and its revision on the hub.

    Raises:
        InputError: There is no such model, or the folder is no pipeline.
        UsageError: The name is empty.
    """
    if entry is not None and entry.name == model and entry.source == "shipped":
        return shipped_folder(entry.location), None
    if entry is not None and entry.name == model and entry.source == "hub":
        return download(entry.location, entry.revision)
    if not model.strip():
        raise UsageError("--model is empty.", hint="edadm models")
    path = Path(model).expanduser()
    if entry is not None and entry.name == model and entry.source in _BY_HAND:
        path = Path(entry.location)
        if not path.exists():
            what, remedy = _BY_HAND[entry.source]
            raise InputError(
                f"The weights of {model} are {what}, which was expected at {path} and is not there.",
                hint=f"{remedy}, give --model its path, or take {model}-random",
            )
    if path.is_dir():
        if not (path / INDEX_NAME).is_file():
            has_config = (path / "config.json").is_file()
            raise InputError(
                f"{path} is not a diffusers pipeline: it has no {INDEX_NAME}.",
                hint=f"give --model the folder of the whole pipeline, which has {INDEX_NAME}" if has_config else None,
            )
        return path.resolve(), None
    if path.is_file():
        return path.absolute(), None  # a link keeps its name: in the hub's cache, the file behind it has none
    if looks_like_hub_id(model):
        return download(model, None)
    alike = get_close_matches(model, known_models())
    raise InputError(
        f"There is no model '{model}': it is neither a known name, nor a folder or a checkpoint file, nor a hub id "
        "such as owner/name.",
        hint=f"edadm models lists the known names{f', such as {alike[0]}' if alike else ''}",
    )
