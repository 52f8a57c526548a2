"""Writes and reads the files of a denoiser's graph: OpenVINO's two files, and a JSON file that describes them."""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from edadm_cli.engines.graph.description import GraphDescription, load_description
from edadm_cli.engines.openvino.denoiser import Shapes
from edadm_cli.errors import InputError

FORMAT_VERSION = 4
"""The version of the files. Readers of version 3 do not know `$each` in a call; see `call_templates.Template`."""
GRAPH_FILE, WEIGHTS_FILE = "denoiser.xml", "denoiser.bin"


class Description(GraphDescription):
    """Holds what the graph itself does not say.

    Attributes:
        openvino: The version of OpenVINO that wrote the graph.
        shapes: The shapes of the inputs for the example call, for which the graph is compiled when it is loaded.
    """

    format_version: int = FORMAT_VERSION
    openvino: str
    shapes: Shapes


def write(graph: ov.Model, description: Description, folder: Path) -> None:
    """Writes the files, in which a four-bit constant takes four bits."""
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(graph, folder / GRAPH_FILE, compress_to_fp16=False)
    description.save(folder)


def read(folder: Path) -> tuple[ov.Model, Description]:
    """Returns the graph and the description that `write` wrote.

    Raises:
        InputError: A file is missing or broken, or has another version.
    """
    description = load_description(folder, Description, FORMAT_VERSION, "openvino", (GRAPH_FILE, WEIGHTS_FILE))
    try:
        graph = ov.Core().read_model(folder / GRAPH_FILE)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"OpenVINO cannot read {folder / GRAPH_FILE}: {reason}", hint="edadm export --engine openvino --force"
        ) from error
    return graph, description
