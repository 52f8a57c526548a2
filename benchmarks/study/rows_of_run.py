"""What programs share that measure rows on a run: their command line, their table, and how they load the run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edadm_cli.models.loaded import LoadedModel

Rows = Sequence[Mapping[str, Any]]


def rows_parser(description: str | None, bits: str, images: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that these programs share.

    Args:
        description: What `--help` says.
        bits: The default of `--bits`.
        images: The default of `--images`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="a file of measured rows, whose table is printed; nothing is run")
    parser.add_argument("--run", type=Path, help="the run folder, with a reconstruction at each of --bits")
    parser.add_argument("--bits", default=bits, help="bit widths, with commas")
    parser.add_argument("--images", type=int, default=images, help="pictures per row")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    return parser


def print_table(options: argparse.Namespace, measure: Callable[[], Rows], table: Callable[[Rows], str]) -> None:
    """Prints the table of the rows of a file, or of rows that are measured and appended to a file first.

    Args:
        options: The options of `rows_parser`.
        measure: It measures the rows.
        table: It returns their table.
    """
    if options.rows is not None:
        print(table([json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]))
        return
    rows = measure()
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    print(table(rows))


def load_widths(run: Path, widths: Sequence[str], device: str) -> dict[str, LoadedModel]:
    """Returns the pipeline of a run by bit width, with the reconstruction of that width; `""` is full precision."""
    import torch

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.artifacts.quantization import load_plan
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.quant.network import load_quant_params, quantize_network

    folder, models = RunFolder(run), {}
    collected = CollectedRun.open(folder)
    for width in widths:
        models[width] = collected.load(torch.device(device), torch.float32)
        if width:
            artifact = folder.open("reconstruct", width)
            quantize_network(models[width].denoiser, load_plan(artifact))
            load_quant_params(models[width].denoiser, artifact.tensors("quant_params.safetensors"))
    return models
