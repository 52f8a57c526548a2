"""Reads what is known of GPUs: `sm_<arch>.json` in this folder, one file per compute capability.

    {
      "gpu": "NVIDIA H200",
      "software": {"torch": "2.11.0", "triton": "3.6.0"},
      "instruction": "wgmma",
      "machine": {"multiprocessors": 132, "macs_per_clock": 4096, "l2_bytes_per_clock": 70, "shared_bytes": 227000},
      "costs": {"program_clocks": 2570, "element_clocks": 0.27, "geglu_factor": 1.27, "step_clocks": 520},
      "fastest": [
        {"kind": "linear", "m": 512, "n": 1280, "k": 1280, "tile": [64, 64, 128], "split": 1}
      ]
    }

`benchmarks/tile_table.py` writes such a file from a session on a GPU. A GPU without a file is served by that of an
earlier compute capability (`tiles.known_arch`). A file without `costs` has those of compute capability 9.0, the only
ones that were fitted to measurements; a file without `fastest` leaves every choice to the cost model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, TypeVar, cast

Instruction = Literal["wgmma", "mma"]
Product = tuple[str, int, int, int]
"""Kind of kernel, M (rows or output pixels), N (output channels) and K (terms per sum)."""
TileShape = tuple[int, int, int, int]
"""Rows, columns and terms per step of a tile, and the number of parts of a split sum."""
FITTED = 90
"""The compute capability whose costs were fitted to measurements."""
_KEYS = {"gpu", "software", "instruction", "machine", "costs", "fastest"}


@dataclass(frozen=True)
class Machine:
    """What the data sheet says of a GPU.

    Args:
        multiprocessors: Number of multiprocessors.
        macs_per_clock: int8 multiplications per clock and multiprocessor.
        l2_bytes_per_clock: Bytes that the L2 delivers per clock and multiprocessor.
        shared_bytes: Bytes of shared memory per multiprocessor.
    """

    multiprocessors: int
    macs_per_clock: int
    l2_bytes_per_clock: int
    shared_bytes: int


@dataclass(frozen=True)
class Costs:
    """Constants of the cost model of products in Triton.

    Args:
        program_clocks: Clocks until the pipeline of a program is filled.
        element_clocks: Clocks of the epilogue per element of the output.
        geglu_factor: How many times longer the epilogue of a gated product takes.
        step_clocks: Latency of the matrix instruction of one step, for which the step waits.
    """

    program_clocks: float
    element_clocks: float
    geglu_factor: float
    step_clocks: float


@dataclass(frozen=True)
class Tuning:
    """What is known of the GPUs of one compute capability.

    Args:
        gpu: Name of the GPU that the numbers are of.
        software: Versions with which `fastest` was measured.
        instruction: The integer matrix instruction whose tiles are used.
        machine: The data sheet.
        costs: Constants of the cost model.
        fastest: Measured choices, which come before those of the cost model; int8 weights.
    """

    gpu: str
    software: Mapping[str, str]
    instruction: Instruction
    machine: Machine
    costs: Costs
    fastest: Mapping[Product, TileShape]


@lru_cache(maxsize=1)
def architectures() -> tuple[int, ...]:
    """Returns the compute capabilities that have a file, such as 90 for 9.0, in ascending order."""
    names = (file.name for file in files(__package__).iterdir())
    return tuple(sorted(int(name[3:-5]) for name in names if name.startswith("sm_") and name.endswith(".json")))


@lru_cache(maxsize=16)
def load(arch: int) -> Tuning:
    """Returns what the file of compute capability `arch` says.

    Raises:
        ValueError: The file has an unknown entry, lacks one, or has one of a wrong type.
    """
    name = f"sm_{arch}.json"
    return parse(json.loads(files(__package__).joinpath(name).read_text(encoding="utf-8")), name)


def parse(content: Any, name: str) -> Tuning:
    """Returns the tuning that the content of a file describes.

    Args:
        content: What was read from JSON.
        name: The name of the file, for errors.

    Raises:
        ValueError: An entry is unknown, missing, or has a wrong type.
    """
    if not isinstance(content, dict) or not {"gpu", "instruction", "machine"} <= content.keys() <= _KEYS:
        raise ValueError(f"{name}: gpu, instruction and machine are expected, and costs, fastest or software")
    if content["instruction"] not in ("wgmma", "mma"):
        raise ValueError(f"{name}: the instruction wgmma or mma is expected, found {content['instruction']!r}")
    costs = _numbers(Costs, content["costs"], name) if "costs" in content else load(FITTED).costs
    return Tuning(
        gpu=content["gpu"],
        software=content.get("software", {}),
        instruction=content["instruction"],
        machine=_numbers(Machine, content["machine"], name),
        costs=costs,
        fastest=dict(_measured(row, name) for row in content.get("fastest", [])),
    )


Record = TypeVar("Record", Machine, Costs)


def _numbers(record: type[Record], content: Any, name: str) -> Record:
    """Returns a record of positive numbers."""
    keys = {field.name for field in fields(record)}
    numbers = isinstance(content, dict) and all(isinstance(x, int | float) and x > 0 for x in content.values())
    if not numbers or content.keys() != keys:
        entry = record.__name__.lower()
        raise ValueError(f"{name}: positive numbers {', '.join(sorted(keys))} are expected in {entry}, found {content}")
    return record(**content)


def _measured(row: Any, name: str) -> tuple[Product, TileShape]:
    """Returns one measured choice."""
    expected = {"kind": str, "m": int, "n": int, "k": int, "tile": list, "split": int}
    if not isinstance(row, dict) or row.keys() != expected.keys():
        raise ValueError(f"{name}: a choice with {', '.join(expected)} is expected in fastest, found {row}")
    if not all(isinstance(row[key], kind) for key, kind in expected.items()) or len(row["tile"]) != 3:
        raise ValueError(f"{name}: whole numbers and a tile of three are expected in fastest, found {row}")
    return (row["kind"], row["m"], row["n"], row["k"]), cast(TileShape, (*row["tile"], row["split"]))


def as_json(tuning: Mapping[str, Any]) -> str:
    """Returns the text of a file, one measured choice per line."""
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in tuning.items() if key != "fastest"]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in tuning.get("fastest", []))
    if rows:
        parts.append(f'  "fastest": [\n{rows}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"
