"""What a graph's files say besides the graph: the call interface, and what the layers were planned as."""

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
    """One layer of a denoiser as it was planned; the runtime graph says later how it runs.

    Attributes:
        name: Dotted name of the layer.
        kind: What is multiplied.
        planned: Bits such as `w4a8`, or `float`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: LayerKind
    planned: str


class GraphDescription(BaseModel):
    """What the graph alone does not say.

    Attributes:
        format_version: Version of the files.
        interface: How calls become inputs.
        layers: The layers as they were planned.
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
    """Loads what `GraphDescription.save` wrote, after a look at whether all files are there.

    Args:
        folder: The folder of the files.
        cls: The engine's own kind of description.
        format_version: The version that the engine reads.
        engine: Name of the engine.
        files: Names of the other files.

    Raises:
        InputError: A file is missing or broken, or of another version.
    """
    again = f"edadm export --engine {engine} --force"
    for name in (*files, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}.", hint=again)
    try:
        description = cls.model_validate(load_json(folder / DESCRIPTION_FILE))
    except ValidationError as error:
        raise InputError(
            f"{folder / DESCRIPTION_FILE} does not describe a graph of this edadm: {error.errors()[0]['msg']}.",
            hint=again,
        ) from error
    if description.format_version != format_version:
        raise InputError(
            f"{folder} holds files of another version of edadm: their format is {description.format_version}, and the"
            f" engine '{engine}' reads format {format_version}.",
            hint=again,
        )
    return description
