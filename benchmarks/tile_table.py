"""Writes the measured choices of tiles for a GPU's compute capability from a session on that GPU.

    python benchmarks/gpu_session.py --sections environment,sweep --out session.jsonl
    python benchmarks/tile_table.py session.jsonl

Changes `kernels/edadm_kernels/tuning/sm_<arch>.json`, where `edadm_kernels.tiles` looks first. A compute capability
without a file gets one, with the data of the capability that served it until then and the multiprocessors of the
session's GPU; check its `machine` against the data sheet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpu.kernels import best_tiles, tile_of

from edadm_kernels import tuning
from edadm_kernels.tiles import Tile, known_arch

TARGET = Path(str(files(tuning)))
GAIN = 0.03
"""A measured tile replaces the chosen one if it saves at least this share of the time."""


def read(lines: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts about the session's GPU and the rows of its sweep."""
    rows = [json.loads(line) for line in lines]
    facts = {key: value for row in rows if row["section"] == "environment" for key, value in row.items()}
    if "arch" not in facts:
        raise SystemExit("The session does not say which GPU it ran on; run it with the section 'environment'.")
    return facts, [row for row in rows if row["section"] == "sweep"]


def choices(swept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tiles in Triton that save time, as rows of a file; kernels in CUDA C++ only have a cost model."""
    rows = []
    for (_, kind, m, n, k, packed), (text, before, after) in best_tiles(swept).items():
        tile = tile_of(text)
        if after < (1 - GAIN) * before and not packed and isinstance(tile, Tile):
            cut = [tile.bm, tile.bn, tile.bk]
            rows.append({"kind": kind, "m": m, "n": n, "k": k, "tile": cut, "split": tile.split_k})
    return rows


def updated(facts: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Returns the content of the file of the session's GPU with the new choices in the place of older ones."""
    path = folder / f"sm_{facts['arch']}.json"
    if path.is_file():
        content: dict[str, Any] = json.loads(path.read_text())
    else:
        served_by = folder / f"sm_{known_arch(facts['arch'])}.json"
        content = {key: value for key, value in json.loads(served_by.read_text()).items() if key != "fastest"}
        content["machine"]["multiprocessors"] = facts["multiprocessors"]
    new = {(row["kind"], row["m"], row["n"], row["k"]): row for row in rows}
    old = {(row["kind"], row["m"], row["n"], row["k"]): row for row in content.get("fastest", [])}
    software = {name: facts[name] for name in ("torch", "triton")}
    content |= {"gpu": facts["gpu"], "software": software}
    content.pop("fastest", None)
    return content | {"fastest": list((old | new).values())}


def write(session: Path, folder: Path = TARGET) -> Path:
    """Writes a session's choices into the file of its GPU and returns the path of that file."""
    with session.open() as lines:
        facts, swept = read(lines)
    content = updated(facts, choices(swept), folder)
    path = folder / f"sm_{facts['arch']}.json"
    tuning.parse(content, path.name)
    path.write_text(tuning.as_json(content))
    return path


def main() -> None:
    """Reads the session that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="lines of JSON that gpu_session.py wrote")
    print(write(parser.parse_args().session))


if __name__ == "__main__":
    main()
