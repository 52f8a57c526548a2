"""Shows a command's JSON object as tables for people; text is shown literally, even if it contains markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from edadm_cli.cli.bench_tables import bench_tables
from edadm_cli.cli.summaries import costs, distances, duration, is_summarized, sizes_on_disk, summary, verdicts
from edadm_cli.cli.text import one_line

_HIDDEN = frozenset({"command", "warnings", "requirements", "metrics", "full_precision", "skipped", "card"})
_SHORT_IDENTITY = 12
_LONG_LIST = 64
_SHORT_TEXT = 12  # characters of a cell that a narrow terminal does not break
_SHORT_NAME = 24  # the same in the first column
_NARROWEST_VALUE = 20
_BORDERS = 7  # columns of the borders and margins of a table of facts


def render(result: Mapping[str, Any]) -> Iterator[Table | Text]:
    """Yields the tables of a result."""
    command = result.get("command")
    if command == "models":
        yield from _models(result["models"])
    elif command == "inspect":
        yield from _inspection(result)
    elif command == "engines":
        yield _engines(result["engines"])
    elif command == "bench" and "rooflines" in result:
        from edadm_cli.bench.roofline import RooflineTable, render_rooflines

        for batch, table in result["rooflines"].items():
            yield Text(one_line(f"{result['model']}, {batch} rows"))
            yield from render_rooflines(RooflineTable.of_json(table))
    elif command == "bench" and "contenders" in result:
        yield from bench_tables(result)
    elif command == "run":
        yield from _chain(result)
    else:
        shown = {key: value for key, value in result.items() if key not in _HIDDEN}
        yield facts(dict(summary(result)) if is_summarized(result) else shown, title=str(command))
        if "metrics" in result:
            yield _metrics(result)
        if "card" in result:
            yield Text(result["card"])
    if result.get("requirements"):
        yield _listing(result["requirements"], ("require", "value", "met"))


def is_list(part: Table | Text) -> bool:
    """Returns whether a part is a table with more columns than names and values."""
    return isinstance(part, Table) and len(part.columns) > 2


def fold_names(table: Table, width: int) -> None:
    """Lets the names in a table of facts take several lines where they would leave no space for the values."""
    names = table.columns[0]
    longest = max((len(str(name)) for name in names.cells), default=0)
    names.no_wrap = longest + _BORDERS + _NARROWEST_VALUE <= width


def facts(fields: Mapping[str, Any], title: str | None = None) -> Table:
    """Returns a table of names and values, nested names dotted."""
    table = Table(title=Text(one_line(title)) if title else None, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flat(fields):
        if value is not None:
            shown = value[:_SHORT_IDENTITY] if name == "identity" else value
            table.add_row(Text(one_line(name)), Text(show_value(shown)))
    return table


def show_value(value: Any) -> str:
    """Returns a value for people: five significant digits, lists separated by spaces, an empty text for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        separator = "\n" if any(isinstance(item, str) for item in value) else " "
        shown = separator.join(show_value(item) for item in value[:_LONG_LIST])
        return f"{shown}{separator}... ({len(value)})" if len(value) > _LONG_LIST else shown
    return one_line(str(value))


def _listing(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], title: str | None = None) -> Table:
    names = tuple(columns)
    table, rows = Table(title=Text(one_line(title)) if title else None, title_justify="left"), list(rows)
    for place, name in enumerate(names):
        longest = _SHORT_TEXT if place else _SHORT_NAME
        is_short = all(len(show_value(row.get(name))) <= longest for row in rows)
        table.add_column(Text(name.replace("_", " ")), overflow="fold", no_wrap=is_short)
    for row in rows:
        table.add_row(*(Text(show_value(row.get(name))) for name in names))
    return table


def _metrics(result: Mapping[str, Any]) -> Table:
    full_precision = result.get("full_precision", {})
    rows = [
        {
            "metric": name,
            result.get("bits", "quantized"): metric["value"],
            "full precision": full_precision.get(name, {}).get("value"),
            "features": metric["features"],
            "images": metric["num_images"],
        }
        for name, metric in result["metrics"].items()
    ]
    columns = ("metric", result.get("bits", "quantized"), "full precision", "features", "images")
    return _listing(rows, columns)


def _models(models: Iterable[Mapping[str, Any]]) -> Iterator[Table | Text]:
    """Yields a table of the models that have weights, and the names of those with random ones."""
    rows, random = [], []
    for model in models:
        if model["source"] == "random":
            random.append(model["name"])
            continue
        weights = "in the package" if model["source"] == "shipped" else model["location"]
        rows.append(
            {**model, "what it is": model["description"], "weights": weights, "offline": bool(model["available"])}
        )
    yield _listing(rows, ("name", "what it is", "weights", "offline", "num_steps"))
    if random:
        yield Text(f"With random weights, which are made offline: {', '.join(random)}")


def _engines(engines: Iterable[Mapping[str, Any]]) -> Table:
    rows = [
        {
            "engine": engine["name"],
            **{device: reason or "yes" for device, reason in engine["refusals"].items()},
            "default for": ", ".join(engine["default_for"]),
            "files": engine["has_files"],
            "what it is": engine["description"],
        }
        for engine in engines
    ]
    return _listing(rows, ("engine", "cpu", "cuda", "default for", "files", "what it is"))


def _chain(result: Mapping[str, Any]) -> Iterator[Table]:
    records = [result["collect"], result["select"]]
    records += [{**record, "bits": bits} for bits, by in result["results"].items() for record in by.values()]
    stages = [
        {**record, "status": record["status"].replace("_", " "), "time": duration(record["seconds"])}
        | {"folder": record["artifact"], "estimate": _estimate(record)}
        for record in records
    ]
    columns: tuple[str, ...] = ("command", "bits", "status", "time", "folder")
    if result["status"] == "planned":
        columns = ("command", "bits", "status", "estimate")
    yield _listing(stages, columns, title="stages")
    evaluated = {bits: by["evaluate"] for bits, by in result["results"].items() if "metrics" in by.get("evaluate", {})}
    for bits, record in evaluated.items():
        export = result["results"][bits].get("export", {})
        rows = [*(sizes_on_disk(export) if "size_mib" in export else ()), *distances(record), *verdicts(export, record)]
        yield facts(dict(rows), title=bits)
        yield _metrics(record)
    yield facts({"Run": result["run"], "Report": result["report"], "Time": duration(result["seconds"])})


def _estimate(stage: Mapping[str, Any]) -> list[str]:
    estimate = stage.get("estimate")
    if estimate is None:
        return [] if stage["status"] == "up_to_date" else ["known once the stages before it are done"]
    return [f"{name}: {value}" for name, value in costs(estimate)]


def _inspection(result: Mapping[str, Any]) -> Iterator[Table | Text]:
    columns: tuple[str, ...] = ("kind", "name", "identity", "parents", "created_at", "intact")
    if any(artifact.get("problem") for artifact in result["artifacts"]):
        columns = (*columns, "problem")
    rows = [
        {
            **artifact,
            "identity": (artifact["identity"] or "")[:_SHORT_IDENTITY],
            "parents": [f"{parent['kind']}:{parent['identity'][:_SHORT_IDENTITY]}" for parent in artifact["parents"]],
        }
        for artifact in result["artifacts"]
    ]
    yield _listing(rows, columns, title=result.get("run"))
    for artifact in result["artifacts"]:
        if artifact["path"] == result["artifact"]:
            yield facts({"model": artifact["model"], "seed": artifact["seed"], "config": artifact["config"]})
            yield _payload(artifact["payload"])
            if any(file["tensors"] for file in artifact["payload"]):
                yield Text("With --json, each tensor is listed with its element type and shape.")


def _payload(files: Iterable[Mapping[str, Any]]) -> Table:
    """Returns one row per file; the tensors are counted by element type, since a large model has thousands."""
    rows = []
    for file in files:
        counts = Counter(info["dtype"] for info in (file["tensors"] or {}).values())
        tensors = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))
        rows.append({"file": file["path"], "bytes": file["bytes"], "tensors": tensors})
    return _listing(rows, ("file", "bytes", "tensors"))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
