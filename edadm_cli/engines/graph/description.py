"""Describes a graph in a file beside it: its call interface and its planned layers."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from edadm_cli.artifacts import load_json, save_json
from edadm_cli.engines.base import LayerKind
from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.engines.listing import list_layers
from edadm_cli.errors import InputError

DESCRIPTION_FILE = "denoiser.json"


class PlannedLayer(BaseModel):
    """Describes one layer of a denoiser as planned. How it really runs is read from the runtime graph later.

    Attributes:
        name: The dotted name of the layer.
        kind: The kind of the layer.
        planned: The planned bits, such as `w4a8`, or `float`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: LayerKind
    planned: str


class GraphDescription(BaseModel):
    """Holds what the graph itself does not say.

    Attributes:
        format_version: The version of the files.
        interface: It turns calls into inputs of the graph.
        layers: The layers as planned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    interface: GraphInterface
    layers: tuple[PlannedLayer, ...]

    def save(self, folder: Path) -> None:
        """Writes the description into the folder of the files."""
        save_json(folder / DESCRIPTION_FILE, self.model_dump(mode="json"))


DescriptionT = TypeVar("DescriptionT", bound=GraphDescription)


def planned_layers(denoiser: nn.Module) -> tuple[PlannedLayer, ...]:
    """Returns every convolution, linear layer and attention of a denoiser, in the order of its modules."""
    rows = list_layers(denoiser, torch.float32, lambda _name, _module: ("int8", None))
    return tuple(PlannedLayer(name=row.name, kind=row.kind, planned=row.planned) for row in rows)


def load_description(
    folder: Path, cls: type[DescriptionT], format_version: int, engine: str, files: tuple[str, ...]
) -> DescriptionT:
    """Loads the description that `GraphDescription.save` wrote, and checks that all files exist.

    Args:
        folder: The folder of the files.
        cls: The engine's class of descriptions.
        format_version: The version that the engine reads.
        engine: The name of the engine.
        files: The names of the other files.

    Raises:
        InputError: A file is missing or broken, or has another version.
    """
    again = f"edadm export --engine {engine} --force"
    for name in (*files, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}.", hint=again)
    content = load_json(folder / DESCRIPTION_FILE)
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != format_version:  # checked before the fields, which differ by version
        raise InputError(
            f"{folder} holds files of another version of edadm: their format is {version}, and the engine '{engine}'"
            f" reads format {format_version}.",
            hint=again,
        )
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"{folder / DESCRIPTION_FILE} does not describe a graph of this edadm: {error.errors()[0]['msg']}.",
            hint=again,
        ) from error
