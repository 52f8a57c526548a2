"""The tables of a bench: the machine, the contenders, the time by kind of operation, and the summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from edadm_cli.cli.text import one_line

_OURS = "bold"
_FASTEST = "green"


def bench_tables(result: Mapping[str, Any]) -> Iterator[Table | Text]:
    """Yields the tables of a bench, and its summary below them."""
    yield Text(f"{one_line(result['subject'])}\n{one_line(_machine(result['machine']))}")
    yield _contenders(result)
    for bits, facts in result["by_bits"].items():
        yield _kinds(bits, facts["by_kind"])
    yield Text("\n".join(_parity(bits, facts) for bits, facts in result["by_bits"].items()))
    yield Text(result["headline"], style=_OURS)
    yield Text(one_line(result["artifact"]))


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu")
    if gpu:
        return f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, torch {machine['versions']['torch']}"
    flags = ", ".join(machine["cpu_flags"])
    versions = machine["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "openvino") if name in versions)
    return f"{machine['cpu']} ({flags}), {machine['threads']} threads, {libraries}"


def _contenders(result: Mapping[str, Any]) -> Table:
    contenders = result["contenders"]
    batches = list(contenders[0]["throughput"])
    has_pipeline = any(row.get("pipeline") for row in contenders)
    table = Table(title=f"batch {batches[0]}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("ms", "min - max", "times", "memory MiB", "disk MiB", "load s"):
        table.add_column(name, justify="right", no_wrap=True)
    for batch in batches[1:]:
        table.add_column(f"rows/s at {batch}", justify="right")
    if has_pipeline:
        table.add_column("image s", justify="right")
    fastest = min(row["latency_ms"]["median"] for row in contenders)
    eager = next((row["latency_ms"]["median"] for row in contenders if row["name"] == "torch float32"), None)
    for row in contenders:
        latency = row["latency_ms"]
        cells = [
            row["name"],
            _number(latency["median"]),
            f"{_number(latency['min'])} - {_number(latency['max'])}",
            "" if eager is None else f"{eager / latency['median']:.2f}",
            _number(row["peak_memory_mib"]),
            _number(row["size_mib"]),
            _number(row["load_seconds"]),
        ]
        cells += [_number(row["throughput"].get(batch)) for batch in batches[1:]]
        if has_pipeline:
            cells.append(_number((row.get("pipeline") or {}).get("seconds")))
        is_ours = row["engine"] == result["engine"] and row["bits"] is not None
        style = _FASTEST if latency["median"] == fastest else _OURS if is_ours else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _kinds(bits: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{bits.upper()}: where a call's time goes", title_justify="left")
    for index, name in enumerate(("kind", "precision", "operations", "ms", "share", "TOPS", "of peak")):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in rows:
        percent = row["percent_of_peak"]
        table.add_row(
            row["kind"],
            row["precision"],
            str(row["count"]),
            _number(row["milliseconds"]),
            f"{row['share']:.1%}",
            _number(row["tops"]),
            "" if percent is None else f"{percent:.0f}%",
        )
    return table


def _parity(bits: str, facts: Mapping[str, Any]) -> str:
    parity, coverage = facts["parity"], facts["coverage"]
    floats = [row for row in facts["layers"] if row["reason"]]
    reasons = sorted({row["reason"] for row in floats})
    text = (
        f"{bits.upper()}: {coverage['quantized']} of {coverage['planned']} planned layers in INT8, {coverage['kept']}"
        f" left in float; worst layer {parity['max_rel_l2']:.1e} of {parity['bound']:.0e} from exact integers"
        f" ({parity['layers_checked']} of {parity['layers']} checked), the prediction {parity['prediction_rel_l2']:.1e}"
        f" of {parity['prediction_bound']:.1e} (quantization itself costs {parity['quantization_rel_l2']:.1e})"
    )
    return text + "".join(f"\n  {reason}" for reason in reasons[:5])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
