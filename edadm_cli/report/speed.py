"""The section about speed: the results of the benches, their parity, and the time by kind of operation."""

from __future__ import annotations

from edadm_cli.artifacts import BenchResult, QuantizedFacts
from edadm_cli.report.contents import Part, RunContents
from edadm_cli.report.formats import NOTHING, count, mebibytes, number, percentage, plain, seconds
from edadm_cli.report.html import Html, Node, code, details, element, facts, section, table
from edadm_cli.report.plots import bar

_LEAD = (
    "One call of the denoiser, every contender in the same run and in turns: medians, with the shortest and the "
    "longest call. Before anything was timed, the engine's layers were compared with exact integers."
)


def speed_section(contents: RunContents) -> Html | None:
    """Returns the section with every bench of the run; `None` if there is none."""
    if not contents.benches:
        return None
    parts: list[Node] = [element("p", _LEAD, class_="lead")]
    for bench in contents.benches:
        parts += [element("h3", _title(bench)) if len(contents.benches) > 1 else None, *_bench(bench)]
    return section("speed", "Speed", parts)


def _title(bench: Part[BenchResult]) -> str:
    bits = ", ".join(width.upper() for width in bench.facts.bits)
    return f"{bits} on {bench.facts.engine}, {plain(bench.config.get('device'))}"


def _bench(bench: Part[BenchResult]) -> list[Node]:
    result = bench.facts
    return [
        element("p", element("strong", result.headline)),
        _contenders(bench),
        facts(_machine(result)),
        *(_width(bits, width) for bits, width in result.by_bits.items()),
    ]


def _contenders(bench: Part[BenchResult]) -> Html:
    rows: list[list[Node]] = []
    contenders = sorted(bench.facts.contenders, key=lambda row: row.latency_ms.median)
    slowest = contenders[-1].latency_ms.median
    eager = next((row.latency_ms.median for row in contenders if row.name == "torch float32"), None)
    batches = list(contenders[0].throughput)
    has_images = any(row.pipeline for row in contenders)
    for row in contenders:
        latency = row.latency_ms
        spread = f"{number(latency.min, 3)} to {number(latency.max, 3)}"
        cells: list[Node] = [
            row.name,
            [number(latency.median, 3), element("small", spread)],
            bar(latency.median / slowest, "before" if row.bits is None else "after"),
            NOTHING if eager is None else f"{eager / latency.median:.2f}\u00d7",
            mebibytes(row.peak_memory_mib),
            mebibytes(row.size_mib),
        ]
        cells += [number(row.throughput.get(batch), 3) for batch in batches[1:]]
        if has_images:
            cells.append(seconds(row.pipeline.seconds if row.pipeline else None) or NOTHING)
        rows.append(cells)
    header = ["contender", "milliseconds", "to scale", "against fp32", "memory", "on disk"]
    header += [f"rows/s at {batch}" for batch in batches[1:]] + (["an image"] if has_images else [])
    numeric = [index for index in range(1, len(header)) if index != 2]
    return table(header, rows, f"Contenders of {_title(bench)}, batch {batches[0]}", numeric=numeric)


def _machine(result: BenchResult) -> list[tuple[Node, Node]]:
    machine = result.machine
    gpu = machine.get("gpu") or {}
    rates = ", ".join(f"{name} {number(rate, 3)}" for name, rate in result.peak_tops.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cores = machine["logical_cores"] or machine["threads"]
    return [
        ("measured", result.subject),
        (
            "processor",
            f"{machine['cpu']}, {machine['threads']} of {count(cores, 'core')}",
        ),
        ("instructions", ", ".join(machine["cpu_flags"])),
        ("GPU", gpu.get("name")),
        ("driver", gpu.get("driver")),
        ("highest measured rates, 10\u00b9\u00b2 operations per second", rates),
        ("versions", versions),
    ]


def _width(bits: str, width: QuantizedFacts) -> Html:
    title = bits.upper()
    parity, coverage = width.parity, width.coverage
    pairs: list[tuple[Node, Node]] = [
        ("layers in INT8", f"{coverage.quantized:,} of {coverage.planned:,} planned"),
        ("worst layer, relative L2 from exact integers", number(parity.max_rel_l2, 3)),
        ("bound on it", number(parity.bound, 2)),
        ("that layer", code(parity.layer)),
        ("the prediction, relative L2", number(parity.prediction_rel_l2, 3)),
        ("bound on it ", number(parity.prediction_bound, 3)),
        ("error of quantization itself", number(parity.quantization_rel_l2, 3)),
    ]
    kinds: list[list[Node]] = [
        [
            row.kind,
            row.precision,
            number(row.count),
            number(row.milliseconds, 3),
            percentage(row.share),
            number(row.tops, 3),
            NOTHING if row.percent_of_peak is None else f"{row.percent_of_peak:.0f}\u00a0%",
        ]
        for row in width.by_kind
    ]
    layers: list[list[Node]] = [
        [code(row.name), row.kind, row.planned, row.precision, row.reason] for row in width.layers
    ]
    kind_header = ["kind", "precision", "operations", "ms", "share", "TOPS", "of peak"]
    layer_header = ["layer", "kind", "planned", "ran in", "reason if not as planned"]
    return element(
        "div",
        element("h4", f"{title}: parity"),
        facts(pairs),
        details(f"{title}: where a call's time goes", table(kind_header, kinds, f"Kinds, {title}", range(2, 7))),
        details(f"{title}: the precision every layer ran in", table(layer_header, layers, f"Layers, {title}")),
    )
