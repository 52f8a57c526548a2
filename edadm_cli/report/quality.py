"""The sections about the images of the quantized pipeline: metrics and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from edadm_cli.artifacts import Evaluation
from edadm_cli.metrics.registry import in_order, metrics
from edadm_cli.report.contents import Part, RunContents, Width
from edadm_cli.report.formats import label_of, metric_value, number
from edadm_cli.report.html import Html, Node, code, details, element, section, sentences, table
from edadm_cli.report.images import build_walls, show_wall
from edadm_cli.report.notices import caution, missing, per_width

_ARROWS = {"lower": "↓ lower is better", "higher": "↑ higher is better"}


def images_section(contents: RunContents) -> Html | None:
    """Returns the section with images of the same seeds, at full precision and quantized."""
    walls = build_walls(contents.widths)
    if not walls:
        return None
    lead = (
        "Each pair has the same seed and prompt: the image at full precision, and the quantized one with the PSNR "
        "between the two."
    )
    return section("images", "Side by side", element("p", lead, class_="lead"), [show_wall(wall) for wall in walls])


def quality_section(contents: RunContents) -> Html:
    """Returns the section with every metric of every evaluation, and its features."""
    return section("quality", "Quality", per_width(contents, "evaluate", partial(_quality, contents=contents)))


def _quality(width: Width, contents: RunContents) -> Html | None:
    """Returns the evaluation of a bit width, and below it those on engines, with step caches and in other features."""
    heading = "h4" if len(contents.widths) > 1 else "h3"
    plain = None if width.evaluate is None else _evaluation(width.evaluate, width.title)
    nodes: list[Node] = [plain or missing(contents, "evaluate", width.bits)]
    for part in width.further:
        circumstances = circumstances_of(part)
        nodes += [element(heading, f"Evaluated {circumstances}"), _evaluation(part, f"{width.title} {circumstances}")]
    return element("div", nodes, [caution(text) for text in width.unreadable])


def circumstances_of(part: Part[Evaluation]) -> str:
    """Returns how an evaluation differs from the plain one, such as `on the engine openvino`."""
    words = {"engine": "on the engine", "features": "in features of", "cache": "with the step cache"}
    named = (f"{text} {part.config[key]}" for key, text in words.items() if part.config.get(key))
    return ", ".join(named) or part.artifact.path.name


def _evaluation(part: Part[Evaluation], title: str) -> Html:
    facts = part.facts
    return element(
        "div",
        element("p", _sampling(part), class_="lead"),
        sentences(facts.verdict),
        _metrics(title, facts),
        _growth(title, facts),
        *_skipped(facts.skipped),
        *(caution(_with_label(text)) for text in facts.cautions),
    )


def _sampling(part: Part[Evaluation]) -> str:
    facts = part.facts
    guidance = f", guidance {facts.guidance_scale:g}" if facts.guidance_scale is not None else ""
    real = f" Real images: {facts.real}." if facts.real else ""
    same = facts.num_identical_images
    equal = f" {same:,} of the images equal full precision bit for bit." if same else ""
    return f"{facts.num_images:,} images at each precision, {facts.num_steps} steps{guidance}.{real}{equal}"


def _metrics(title: str, facts: Evaluation) -> Html:
    rows: list[list[Node]] = []
    for name in in_order(facts.metrics):
        metric, full = facts.metrics[name], facts.full_precision.get(name)
        values = [metric_value(name, full.value if full else None), metric_value(name, metric.value)]
        rows.append([_labelled(name), *values, code(metric.features), number(metric.num_images)])
    for name, value in distances_of(facts).items():
        is_one_step = "one_step" in name and facts.one_step is not None
        num_images = facts.one_step.num_images if is_one_step and facts.one_step else facts.num_images
        what = "predictions" if is_one_step else metrics()[name].compared if name in metrics() else ""
        rows.append([_labelled(name, " to full precision"), "", metric_value(name, value), what, number(num_images)])
    header = ["metric", "full precision", title, "features", "images"]
    return table(header, rows, f"Quality of {title}", numeric=(1, 2, 4))


def _growth(title: str, facts: Evaluation) -> Html | None:
    """Returns the errors call by call, of which a sampler may make several per step; `None` without them."""
    error = facts.one_step
    if error is None or not error.growth:
        return None
    rows: list[list[Node]] = []
    for step, (one, growth) in enumerate(zip(error.by_step, error.growth, strict=False)):
        guided = number(error.guided_by_step[step]) if step < len(error.guided_by_step) else ""
        rows.append([str(step), number(one), guided, number(growth)])
    kind = "step" if len(rows) == facts.num_steps else "call"
    header = [kind, "one-step error", "guided", "distance of the trajectories before it"]
    note = f"Relative L2 over {error.num_images:,} trajectories that were not learned from."
    label = f"Errors {kind} by {kind}"
    return details(label, element("p", note), table(header, rows, f"{label} of {title}", range(4)))


def distances_of(facts: Evaluation) -> dict[str, float]:
    """Returns the measured distances to full precision by name, in the order of the table."""
    measured = facts.distance_to_full_precision.model_dump(exclude_none=True)
    return {name: measured[name] for name in in_order(measured)}


def _labelled(name: str, more: str = "") -> list[Node]:
    label = label_of(name)
    return [f"{label.label}{more}", element("small", _ARROWS[label.better]) if label.better else None]


def _with_label(text: str) -> str:
    """Returns a caution with the label of the metric in place of its name."""
    name, space, rest = text.partition(" ")
    return f"{label_of(name).label}{space}{rest}" if name in metrics() else text


def _skipped(skipped: Mapping[str, str]) -> Iterator[Html]:
    """Yields notices about the metrics that could not be computed, one per reason."""
    for reason in sorted(set(skipped.values())):
        labels = [label_of(name).label for name in in_order(skipped) if skipped[name] == reason]
        yield caution(f"Without {', '.join(labels)}: {reason}")
