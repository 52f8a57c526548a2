"""Writes the table of times by which the CUDA engine decides, from a session on a GPU.

    python benchmarks/gpu_session.py --rows 2 16 --sections environment,norms,layers --out session.jsonl
    python benchmarks/product_times.py session.jsonl

Replaces what `edadm_cli/engines/cuda/times.json` says of the session's GPU and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from edadm_cli.engines.cuda import times
from edadm_cli.engines.cuda.times import MeasuredTimes, ProductTime, SourceTime

TARGET = Path(times.__file__).with_name(times.FILE)


def read(lines: Iterable[str]) -> tuple[str, MeasuredTimes]:
    """Returns the name of the GPU and the times in a session's lines of JSON."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        rows[row["section"]].append(row)
    facts = {key: value for row in rows["environment"] for key, value in row.items()}
    if "gpu" not in facts:
        raise SystemExit("The session does not say which GPU it ran on; run it with the section 'environment'.")
    software = {name: facts[name] for name in ("torch", "triton")}
    products, before = _products(rows["layers"]), _before(rows["norms"])
    return facts["gpu"], MeasuredTimes(software=software, products=products, before=before)


def _products(rows: list[dict[str, Any]]) -> tuple[ProductTime, ...]:
    """Returns the mean times of products, weighted by how often each call occurs per step."""
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        if "chosen_us" not in row:
            continue
        _, *matrix, packed = row["key"]
        if not packed:
            values = (1.0, row["chosen_us"], row["float16_us"])
            key = (*matrix, row["adds"])
            sums[key] = [a + row["count"] * b for a, b in zip(sums[key], values, strict=True)]
    return tuple(
        ProductTime(
            kind=kind, m=m, n=n, k=k, adds=adds, int8_us=round(integers / count, 2), float16_us=round(floats / count, 2)
        )
        for (kind, m, n, k, adds), (count, integers, floats) in sorted(sums.items())
    )


def _before(rows: list[dict[str, Any]]) -> tuple[SourceTime, ...]:
    """Returns the times of quantizations, which float16 does not need, and of layer norms beside torch's.

    GroupNorm is left out: in float16 the engine has a separate kernel, which a session times at few sizes.
    """
    fastest: dict[tuple[str, int, int], tuple[float, float]] = {}
    for row in rows:
        operation, _, sizes = str(row.get("call", "")).partition(" ")
        kinds = {"quantize": "quantize", "quantize_joined": "quantize", "layer_norm_quantize": "layer_norm"}
        kind = kinds.get(operation)
        if kind is None:
            continue
        shape = [int(size) for size in sizes.split("x")]
        channels = shape[1] if len(shape) == 4 else shape[-1]
        key = (kind, prod(shape) // channels, channels)
        times = (row["us"], row["float16_us"] if kind == "layer_norm" else 0.0)
        fastest[key] = min(times, fastest.get(key, times))  # of several with a size, the fastest
    return tuple(
        SourceTime(kind=kind, m=m, k=k, int8_us=round(integers, 2), float16_us=round(floats, 2))
        for (kind, m, k), (integers, floats) in sorted(fastest.items())
    )


def write(source: Path, target: Path = TARGET) -> None:
    """Writes a session's times into a table, one product per line."""
    with source.open() as lines:
        gpu, measured = read(lines)
    table = json.loads(target.read_text()) if target.is_file() else {}
    table[gpu] = measured.model_dump()
    target.write_text(_text(table))


def _text(table: Mapping[str, Mapping[str, Any]]) -> str:
    entries = []
    for gpu, measured in sorted(table.items()):
        parts = [f'    "software": {json.dumps(measured["software"])}']
        for key in ("products", "before"):
            rows = ",\n".join(f"      {json.dumps(row)}" for row in measured[key])
            parts.append(f'    "{key}": [\n{rows}\n    ]' if rows else f'    "{key}": []')
        entries.append(f"  {json.dumps(gpu)}: {{\n" + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    """Reads the session that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="lines of JSON that gpu_session.py wrote")
    write(parser.parse_args().session)
    print(TARGET)


if __name__ == "__main__":
    main()
