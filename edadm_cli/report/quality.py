"""The sections about what the quantized pipeline draws: figures and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edadm_cli.artifacts import Evaluation
from edadm_cli.report.contents import Part, RunContents, Width
from edadm_cli.report.formats import FIGURES, figure_of, figure_value, in_order, number
from edadm_cli.report.html import Html, Node, code, element, section, table
from edadm_cli.report.images import build_walls, show_wall
from edadm_cli.report.notices import caution, missing

_ARROWS = {"lower": "↓ lower is better", "higher": "↑ higher is better"}


def images_section(contents: RunContents) -> Html | None:
    """Images of the same seeds at full precision and quantized."""
    walls = build_walls(contents.widths)
    if not walls:
        return None
    lead = "Same seed, same prompt: at full precision, and quantized beside it with the PSNR between the two."
    return section("images", "Side by side", element("p", lead, class_="lead"), [show_wall(wall) for wall in walls])


def quality_section(contents: RunContents) -> Html:
    """Every figure of every evaluation, with the features it was computed in."""
    parts: list[Node] = []
    if not contents.widths:
        parts.append(missing(contents, "evaluate", None))
    for width in contents.widths:
        parts.append(element("h3", width.title) if len(contents.widths) > 1 else None)
        parts.append(_quality(contents, width))
    return section("quality", "Quality", parts)


def _quality(contents: RunContents, width: Width) -> Html:
    if width.evaluate is None:
        return missing(contents, "evaluate", width.bits)
    facts = width.evaluate.facts
    parts = [
        element("p", _sampling(width.evaluate), class_="lead"),
        _figures(width, facts),
        *_skipped(facts.skipped),
        *(caution(_with_label(text)) for text in facts.cautions),
    ]
    return element("div", parts)


def _sampling(part: Part[Evaluation]) -> str:
    facts = part.facts
    guidance = f", guidance {facts.guidance_scale:g}" if facts.guidance_scale is not None else ""
    real = f" Real images: {facts.real}." if facts.real else ""
    same = facts.num_identical_images
    equal = f" {same:,} of the images equal full precision bit for bit." if same else ""
    return f"{facts.num_images:,} images at each precision, {facts.num_steps} steps{guidance}.{real}{equal}"


def _figures(width: Width, facts: Evaluation) -> Html:
    rows: list[list[Node]] = []
    for name in in_order(facts.metrics):
        metric, full, figure = facts.metrics[name], facts.full_precision.get(name), figure_of(name)
        label = [figure.label, element("small", _ARROWS[figure.better]) if figure.better else None]
        values = [figure_value(name, full.value if full else None), figure_value(name, metric.value)]
        rows.append([label, *values, code(metric.features), number(metric.num_images)])
    distance = facts.distance_to_full_precision
    for label_text, better, value in (
        ("PSNR to full precision", "higher", f"{number(distance.psnr_db)}\u00a0dB"),
        ("Relative L2 to full precision", "lower", number(distance.latent_rel_l2)),
    ):
        features = "pixels" if better == "higher" else "final latent"
        rows.append([[label_text, element("small", _ARROWS[better])], "", value, features, number(facts.num_images)])
    header = ["figure", "full precision", width.title, "features", "images"]
    return table(header, rows, f"Quality of {width.title}", numeric=(1, 2, 4))


def _with_label(text: str) -> str:
    """A caution that begins with a figure's name, with the label that the table has."""
    name, space, rest = text.partition(" ")
    return f"{figure_of(name).label}{space}{rest}" if name in FIGURES else text


def _skipped(skipped: Mapping[str, str]) -> Iterator[Html]:
    """Name the figures that could not be had, once for each reason."""
    for reason in sorted(set(skipped.values())):
        labels = [figure_of(name).label for name in in_order(skipped) if skipped[name] == reason]
        yield caution(f"Without {', '.join(labels)}: {reason}")
