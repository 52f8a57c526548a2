"""The top of the page: what was done to which model, and the figures that count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm_cli.report.contents import RunContents, Width
from edadm_cli.report.formats import figure_of, figure_value, in_order, mebibytes, number
from edadm_cli.report.html import Html, Node, element, section, table

_DISTANCES = ("frechet_distance", "fid")
_FULL = "full precision"


def headline(contents: RunContents) -> Html:
    """The page's title and one sentence on what it shows."""
    widths = " and ".join(width.title for width in contents.widths)
    title = element("h1", contents.name, " ", element("span", f"→ {widths}", class_="to") if widths else None)
    return element("header", element("p", "Quantization report", class_="eyebrow"), title, _lead(contents))


def cards(contents: RunContents) -> Html | None:
    """The headline figures of each bit width that has any."""
    rows: list[Node] = []
    for width in contents.widths:
        shown = list(_cards(width))
        if shown:
            several = len(contents.widths) > 1
            rows.append(element("h3", width.title) if several else None)
            rows.append(element("div", shown, class_="cards"))
    return section("figures", "At a glance", rows) if rows else None


def comparison(contents: RunContents) -> Html | None:
    """All bit widths in one table, where there are several."""
    if len(contents.widths) < 2:
        return None
    names = in_order({name for width in contents.widths for name in _metrics(width)})
    header = ["", "recipe", "denoiser", "times smaller", "PSNR, dB", "relative L2", "images"]
    header += [figure_of(name).label for name in names]
    rows = [_comparison_row(width, names) for width in contents.widths]
    full = _common_full_precision(contents)
    if full is not None:
        figures = [figure_value(name, _value(full, name)) for name in names]
        rows.append([_FULL, "", _full_size(contents), "", "", "", "", *figures])
    numeric = range(2, len(header))
    return section("comparison", "Bit widths compared", table(header, rows, "Bit widths compared", numeric))


def denoiser_of(sizes: dict[str, float]) -> str | None:
    """The component that an export's size ratio is about."""
    wanted = sizes["denoiser_fp32"] / sizes["ratio"]
    components = [name for name in sizes if name not in ("denoiser_fp32", "ratio")]
    return min(components, key=lambda name: abs(sizes[name] - wanted), default=None)


def _lead(contents: RunContents) -> Html:
    if contents.collect is None:
        return element("p", "What this run holds, with the figures of each stage.", class_="lead")
    entry = contents.collect.facts["entry"]
    sentence = f"{entry['description'].rstrip('.')}." if entry.get("description") else ""
    if contents.widths:
        aim = "Its denoiser was quantized after training; the rest of the pipeline is as it was."
    else:
        aim = "Sampled at full precision; no bit width has been made yet."
    return element("p", f"{sentence} {aim}".strip(), class_="lead")


def _cards(width: Width) -> Iterator[Html]:
    if width.export is not None:
        sizes = width.export.facts["size_mib"]
        name = denoiser_of(sizes)
        note = f"{mebibytes(sizes[name])} on disk, from {mebibytes(sizes['denoiser_fp32'])} in fp32" if name else ""
        yield _card("Denoiser size", f"{number(sizes['ratio'], 3)}\u00d7", "smaller", note)
    if width.evaluate is None:
        return
    facts = width.evaluate.facts
    for name in (*_DISTANCES, "prompt_accuracy"):
        if name in facts["metrics"]:
            yield _metric_card(name, facts)
    distance, images = facts["distance_to_full_precision"], f"to {_FULL}, mean of {facts['num_images']:,} images"
    yield _card("Relative L2", number(distance["latent_rel_l2"], 3), None, f"of the latent {images}")
    yield _card("PSNR", number(distance["psnr_db"], 3), "dB", images)


def _metric_card(name: str, facts: dict[str, Any]) -> Html:
    metric, full = facts["metrics"][name], facts["full_precision"].get(name)
    note = f"{_FULL} {figure_value(name, full['value'])}" if full else ""
    note = f"{note}; {metric['features']}, {metric['num_images']:,} images".lstrip("; ")
    return _card(figure_of(name).label, figure_value(name, metric["value"]), None, note)


def _card(label: str, value: str, unit: str | None, note: str) -> Html:
    figure = element("p", value, element("span", f" {unit}", class_="unit") if unit else None, class_="figure")
    return element("div", element("p", label, class_="label"), figure, element("p", note, class_="note"), class_="card")


def _comparison_row(width: Width, names: list[str]) -> list[Node]:
    sizes = width.export.facts["size_mib"] if width.export is not None else {}
    name = denoiser_of(sizes) if sizes else None
    facts = width.evaluate.facts if width.evaluate is not None else {}
    distance = facts.get("distance_to_full_precision", {})
    metrics = _metrics(width)
    return [
        width.title,
        width.recipe or "",
        mebibytes(sizes[name]) if name else "",
        number(sizes["ratio"], 3) if sizes else "",
        number(distance["psnr_db"]) if distance else "",
        number(distance["latent_rel_l2"]) if distance else "",
        number(facts["num_images"]) if facts else "",
        *(figure_value(name, _value(metrics, name)) for name in names),
    ]


def _common_full_precision(contents: RunContents) -> dict[str, Any] | None:
    """The figures of full precision, if every evaluation compared with the same."""
    found = [w.evaluate.facts["full_precision"] for w in contents.widths if w.evaluate is not None]
    return found[0] if found and all(one == found[0] for one in found) else None


def _full_size(contents: RunContents) -> str:
    sizes = {w.export.facts["size_mib"]["denoiser_fp32"] for w in contents.widths if w.export is not None}
    return mebibytes(sizes.pop()) if len(sizes) == 1 else ""


def _metrics(width: Width) -> dict[str, Any]:
    return width.evaluate.facts["metrics"] if width.evaluate is not None else {}


def _value(metrics: dict[str, Any], name: str) -> float | None:
    return metrics[name]["value"] if name in metrics else None
