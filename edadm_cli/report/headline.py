"""The top of the page: the model, its quantization, and the most important metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edadm_cli.artifacts import Evaluation, Metric
from edadm_cli.metrics.registry import in_order
from edadm_cli.report.contents import RunContents, Width
from edadm_cli.report.formats import label_of, mebibytes, metric_value, number
from edadm_cli.report.html import Html, Node, element, section, table
from edadm_cli.report.quality import distances_of

_DISTANCES = ("frechet_distance", "fid")
_FULL = "full precision"
_LONG_NAME = 24


def headline(contents: RunContents) -> Html:
    """Returns the page's title and one sentence on its contents."""
    widths = ", ".join(width.title for width in contents.widths)
    arrow = [" ", element("span", f"→ {widths}", class_="to")] if widths else None
    title = element("h1", contents.name, arrow, class_="long" if len(contents.name) > _LONG_NAME else None)
    return element("header", element("p", "Quantization report", class_="eyebrow"), title, _lead(contents))


def cards(contents: RunContents) -> Html | None:
    """Returns the headline metrics of each bit width that has any."""
    rows: list[Node] = []
    for width in contents.widths:
        shown = list(_cards(width))
        if shown:
            several = len(contents.widths) > 1
            rows.append(element("h3", width.title) if several else None)
            rows.append(element("div", shown, class_="cards"))
    return section("figures", "At a glance", rows) if rows else None


def comparison(contents: RunContents) -> Html | None:
    """Returns a table of all bit widths; `None` if there is only one."""
    if len(contents.widths) < 2:
        return None
    columns = [_column(width) for width in contents.widths]
    full = _full_precision_column(contents)
    names = in_order({name for column in columns for name in column.metrics})
    distances = in_order({name for column in columns for name in column.distances})
    rows: list[list[Node]] = [
        ["recipe", "", *(column.recipe for column in columns)],
        ["images", "", *(column.images for column in columns)],
        ["denoiser", full.size, *(column.size for column in columns)],
        ["smaller by", "", *(column.ratio for column in columns)],
    ]
    for name in distances:
        label = f"{label_of(name).label} to {_FULL}"
        rows.append([label, "", *(column.distances.get(name, "") for column in columns)])
    for name in names:
        rows.append([label_of(name).label, *(column.metrics.get(name, "") for column in (full, *columns))])
    header = ["metric", _FULL, *(width.title for width in contents.widths)]
    return section(
        "comparison",
        "Bit widths compared",
        table(header, rows, "Bit widths compared", range(1, len(header))),
    )


def _lead(contents: RunContents) -> Html:
    if contents.collect is None:
        return element("p", "The results of each stage of this run.", class_="lead")
    entry = contents.collect.facts.entry
    sentence = f"{entry.description.rstrip('.')}." if entry.description else ""
    if contents.widths:
        aim = _aim(contents.widths)
    else:
        aim = "Sampled at full precision; no bit width has been quantized yet."
    return element("p", f"{sentence} {aim}".strip(), class_="lead")


def _aim(widths: Sequence[Width]) -> str:
    """Returns a sentence on what was quantized: the denoisers, and text encoders where an export has them in 8 bits."""
    exports = [width.export.facts for width in widths if width.export is not None]
    denoisers = "Both denoisers were" if any(facts.further_denoisers for facts in exports) else "Its denoiser was"
    encoders = [width.title for width in widths if width.export is not None and width.export.facts.text_encoders]
    if not encoders:
        return f"{denoisers} quantized after training; the rest of the pipeline is unchanged."
    whose = "" if len(encoders) == len(widths) else f" of {' and '.join(encoders)}"
    return f"{denoisers} quantized after training. The text encoders{whose} have 8-bit weights; the rest is unchanged."


def _cards(width: Width) -> Iterator[Html]:
    if width.export is not None:
        sizes = width.export.facts.size_mib
        size, full = mebibytes(width.export.facts.denoiser_mib), mebibytes(sizes["denoiser_fp32"])
        note = f"denoiser {size} on disk, {full} in fp32"
        yield _card("Smaller by", f"{number(sizes['ratio'], 3)}\u00d7", None, note)
    if width.evaluate is None:
        return
    facts = width.evaluate.facts
    for name in (*_DISTANCES, "prompt_accuracy"):
        if name in facts.metrics:
            yield _metric_card(name, facts)
    distance, images = facts.distance_to_full_precision, f"to {_FULL}, mean of {facts.num_images:,} images"
    yield _card("Relative L2", number(distance.latent_rel_l2, 3), None, f"of the latent {images}")
    yield _card("PSNR", number(distance.psnr_db, 3), "dB", images)
    if facts.one_step is not None:
        error, kind = facts.one_step.guided_rel_l2, "guided prediction"
        if error is None:
            error, kind = facts.one_step.rel_l2, "prediction"
        note = f"of the {kind}, {facts.one_step.num_images:,} trajectories that were not learned from"
        yield _card("One-step error", number(error, 3), None, note)


def _metric_card(name: str, facts: Evaluation) -> Html:
    metric, full = facts.metrics[name], facts.full_precision.get(name)
    note = f"{_FULL} {metric_value(name, full.value)}" if full else ""
    note = f"{note}; {metric.features}, {metric.num_images:,} images".lstrip("; ")
    return _card(label_of(name).label, metric_value(name, metric.value), None, note)


def _card(label: str, value: str, unit: str | None, note: str) -> Html:
    figure = element("p", value, element("span", f" {unit}", class_="unit") if unit else None, class_="figure")
    return element("div", element("p", label, class_="label"), figure, element("p", note, class_="note"), class_="card")


@dataclass(frozen=True)
class _Column:
    """One bit width, or full precision, in the comparison; entries without a metric are empty."""

    recipe: str = ""
    images: str = ""
    size: str = ""
    ratio: str = ""
    distances: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)


def _column(width: Width) -> _Column:
    column = _Column(recipe=width.recipe or "")
    if width.export is not None:
        sizes = width.export.facts.size_mib
        size = mebibytes(width.export.facts.denoiser_mib)
        column = replace(column, size=size, ratio=f"{number(sizes['ratio'], 3)}\u00d7")
    if width.evaluate is not None:
        facts = width.evaluate.facts
        column = replace(
            column,
            images=number(facts.num_images),
            distances={name: metric_value(name, value) for name, value in distances_of(facts).items()},
            metrics=_values(facts.metrics),
        )
    return column


def _full_precision_column(contents: RunContents) -> _Column:
    """Returns the column of full precision; entries that differ between the bit widths' evaluations are empty."""
    evaluated = [w.evaluate.facts.full_precision for w in contents.widths if w.evaluate is not None]
    sizes = {w.export.facts.size_mib["denoiser_fp32"] for w in contents.widths if w.export is not None}
    same = bool(evaluated) and all(metrics == evaluated[0] for metrics in evaluated)
    return _Column(
        size=mebibytes(sizes.pop()) if len(sizes) == 1 else "",
        metrics=_values(evaluated[0]) if same else {},
    )


def _values(metrics: Mapping[str, Metric]) -> dict[str, str]:
    return {name: metric_value(name, metric.value) for name, metric in metrics.items()}
