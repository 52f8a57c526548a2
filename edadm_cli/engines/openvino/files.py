"""A denoiser's graph in files: OpenVINO's own two, and a small JSON with the call interface and the planned layers."""

from __future__ import annotations

from pathlib import Path

import openvino as ov
from pydantic import BaseModel, ConfigDict, ValidationError

from edadm_cli.engines.interface import GraphInterface
from edadm_cli.engines.openvino.denoiser import Shapes
from edadm_cli.engines.openvino.execution import PlannedLayer
from edadm_cli.errors import InputError

FORMAT_VERSION = 2
GRAPH_FILE, WEIGHTS_FILE, DESCRIPTION_FILE = "denoiser.xml", "denoiser.bin", "denoiser.json"
_AGAIN = "edadm export --engine openvino --force"


class Description(BaseModel):
    """What the graph alone does not say.

    Attributes:
        format_version: Of these files.
        openvino: Version that wrote the graph.
        interface: How calls become inputs.
        shapes: Of the inputs of the example call.
        layers: As planned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    openvino: str
    interface: GraphInterface
    shapes: Shapes
    layers: tuple[PlannedLayer, ...]


def write(graph: ov.Model, description: Description, folder: Path) -> None:
    """Write the files; four-bit constants take four bits."""
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(graph, folder / GRAPH_FILE, compress_to_fp16=False)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[ov.Model, Description]:
    """Read what `write` wrote.

    Raises:
        InputError: A file is missing or broken, or of another format.
    """
    for name in (GRAPH_FILE, WEIGHTS_FILE, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            raise InputError(f"There is no {name} in {folder}.", hint=_AGAIN)
    try:
        description = Description.model_validate_json((folder / DESCRIPTION_FILE).read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{folder / DESCRIPTION_FILE} does not describe a graph of this edadm.", hint=_AGAIN
        ) from error
    if description.format_version != FORMAT_VERSION:
        raise InputError(
            f"{folder} holds OpenVINO files of format {description.format_version}, wanted {FORMAT_VERSION}.",
            hint=_AGAIN,
        )
    try:
        graph = ov.Core().read_model(folder / GRAPH_FILE)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"OpenVINO cannot read {folder / GRAPH_FILE}: {reason}", hint=_AGAIN) from error
    return graph, description
