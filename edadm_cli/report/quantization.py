"""The sections about the quantization: reconstruction, layers, and the size and parity of the export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from edadm_cli.artifacts import ExportFacts, Parity, UnitLosses, UnitRow
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.report.contents import RunContents, Width
from edadm_cli.report.formats import count, mebibytes, number, plain, seconds
from edadm_cli.report.html import Html, Node, code, details, element, facts, section, sentences, table
from edadm_cli.report.notices import caution, per_width
from edadm_cli.report.plots import bar, curve_plot, loss_plot

_KINDS = {"conv2d": "convolution", "linear": "linear layer", "attention_products": "attention product"}
_SIZES = "On disk the denoiser is {ratio} times smaller than its weights at four bytes each (fp32)."


def reconstruction_section(contents: RunContents) -> Html:
    """Returns the section with the losses of all units, and the bits of all layers."""
    return section("reconstruction", "Reconstruction", per_width(contents, "reconstruct", _reconstruction))


def export_section(contents: RunContents) -> Html:
    """Returns the section with the sizes on disk and the parity of the export."""
    heading = "h4" if len(contents.widths) > 1 else "h3"
    return section("export", "Size and export", per_width(contents, "export", partial(_export, heading=heading)))


def _reconstruction(width: Width) -> Html | None:
    part = width.reconstruct
    if part is None:
        return None
    coverage, loss = part.facts.coverage, part.facts.loss
    kinds = ", ".join(count(amount, _KINDS.get(kind, kind)) for kind, amount in part.facts.by_kind.items() if amount)
    environment = part.artifact.manifest.environment
    pairs = [
        ("recipe", width.recipe),
        ("quantized", f"{coverage.quantized:,} of {coverage.planned:,} planned"),
        ("of which", kinds),
        ("left in floating point", f"{coverage.kept:,}"),
        ("loss before", None if loss.first is None else f"{number(loss.first)}, summed over the units"),
        ("loss after", None if loss.last is None else number(loss.last)),
        ("loss before h was rounded", None if loss.soft is None else number(loss.soft)),
        ("undecided weights before rounding", None if loss.undecided is None else f"{loss.undecided:.2%}"),
        ("error of the prediction", _together(part.facts.together)),
        ("time taken", seconds(environment.get("seconds"))),
        ("seed", str(part.artifact.manifest.seed)),
    ]
    learned = [unit for unit in part.facts.units if unit.loss_before is not None]
    lead = (
        "Loss of each unit against full precision: rounded to nearest, and after learning."
        if learned
        else "This recipe learns nothing: ranges were searched and weights rounded to nearest."
    )
    summary = f"All {count(len(learned), 'unit')} with their loss curves"
    return element(
        "div",
        element("p", lead, class_="lead"),
        *(caution(text) for text in part.facts.warnings),
        _losses(learned) if learned else None,
        facts(pairs),
        details(summary, _units(width, learned)) if learned else None,
        _layers(width, load_plan(part.artifact)),
    )


def _together(losses: UnitLosses | None) -> str | None:
    """Describes what learning all units together did to the prediction's squared error."""
    if losses is None:
        return None
    if losses.is_nearest or not losses.loss_before:
        return "not lower after all units had learned together, so they stay as each had learned"
    return f"{losses.loss_after / losses.loss_before:.0%} of what it was before all units learned together"


def _losses(units: Sequence[UnitRow]) -> Html:
    keys = [element("span", f"{kind} learning", class_=f"key {kind}") for kind in ("before", "after")]
    title = element("span", "Reconstruction loss", class_="title")
    plot = loss_plot(
        [unit.name for unit in units],
        [unit.loss_before or 0.0 for unit in units],
        [unit.loss_after or 0.0 for unit in units],
    )
    frame = element("div", plot, class_="scroll plain", role="region", aria_label="Loss of each unit", tabindex=0)
    return element("figure", element("figcaption", title, keys), frame, class_="wide")


def _units(width: Width, units: Sequence[UnitRow]) -> Html:
    rows: list[list[Node]] = [
        [
            code(unit.name),
            unit.kind,
            number(len(unit.layers)),
            number(unit.loss_before),
            number(unit.loss_after),
            number(unit.loss_soft) if unit.loss_soft is not None else None,
            f"{unit.undecided:.1%}" if unit.undecided is not None else None,
            curve_plot(unit.curve, f"Loss curve of {unit.name}") if len(unit.curve) > 1 else None,
        ]
        for unit in units
    ]
    note = (
        "A curve shows what the optimizer minimises, on a logarithmic scale of its own: the loss of the unit, those of "
        "its layers, and the rounding regularizer if the recipe has one, which is a jump where it starts. "
        "A weight is undecided where learning ended with 0.05 < h < 0.95."
    )
    header = ["unit", "kind", "layers", "before", "after", "before h was rounded", "undecided", "curve"]
    return element("div", element("p", note), table(header, rows, f"Units of {width.title}", numeric=(2, 3, 4, 5, 6)))


def _layers(width: Width, plan: QuantizationPlan) -> Html:
    """Builds a table of the plan's layers, with the reason for those left out; what no layer has is omitted."""
    rows: list[list[Node]] = [
        [
            code(name),
            str(layer.weight_bits) + (f", groups of {layer.group_size}" if layer.group_size else ""),
            plain(layer.activation_bits or "float"),
            " + ".join(str(size) for size in layer.channel_parts or ()),
            None,
        ]
        for name, layer in plan.layers.items()
    ]
    for name, attention in plan.attentions.items():
        bits = f"{attention.activation_bits}, probabilities {attention.probability_bits}"
        rows.append([code(name), "", bits, "", "both products of the attention"])
    rows += [[code(name), "", "", "", f"left in float: {reason}"] for name, reason in plan.kept.items()]
    header = ["layer", "weight bits", "activation bits", "channel parts", "note"]
    widths = Counter((layer.width, layer.activation_bits is None) for layer in plan.layers.values())
    mixture = ", ".join(
        f"{amount:,} at {layer_width.upper()}{', float inputs' if is_float else ''}"
        for (layer_width, is_float), amount in sorted(widths.items())
    )
    summary = f"All {count(len(plan.layers), 'layer')}: {mixture}"
    return details(summary, table(header, rows, f"Layers of {width.title}", numeric=(1, 2)))


def _export(width: Width, heading: str) -> Html | None:
    part = width.export
    if part is None:
        return None
    sizes, parity = part.facts.size_mib, part.facts.parity
    name, denoisers = part.facts.denoiser, (part.facts.denoiser, *part.facts.further_denoisers)
    full = sizes["denoiser_fp32"]
    components = {key: size for key, size in sizes.items() if key not in ("denoiser_fp32", "ratio")}
    largest = max(full, *components.values())
    title = f"{' and '.join(denoisers)}, fp32 before"
    rows: list[list[Node]] = [[title, mebibytes(full), bar(full / largest, "before")]]
    for key, size in sorted(components.items(), key=lambda item: (item[0] != name, -item[1], item[0])):
        label = f"{key}, {width.title}" if key in denoisers else key
        rows.append([label, mebibytes(size), bar(size / largest, "after" if key in denoisers else "rest")])
    return element(
        "div",
        element("p", _SIZES.format(ratio=number(sizes["ratio"], 3)), class_="lead"),
        sentences((*part.facts.verdict, *_whole(part.facts))),
        table(["component", "size", "to scale"], rows, f"Sizes of {width.title}", numeric=(1,)),
        element(heading, "Parity"),
        facts(_parity(parity)),
    )


def _whole(export: ExportFacts) -> Iterator[str]:
    """Yields sentences on the size of the whole pipeline, and on text encoders with 8-bit weights."""
    whole = export.pipeline
    if whole is not None:
        yield (
            f"The whole pipeline takes {mebibytes(whole.disk_mib)} on disk instead of"
            f" {mebibytes(whole.disk_before_mib)} with the denoiser in float32. Its weights take"
            f" {mebibytes(whole.memory_mib)} in memory instead of {mebibytes(whole.memory_before_mib)}, in float16."
        )
    for name, encoder in export.text_encoders.items():
        error = "" if encoder.rel_l2 is None else f"; its last states differ by {number(encoder.rel_l2)} (relative L2)"
        yield f"{name} has {encoder.bits}-bit weights in {encoder.layers} layers{error}."


def _parity(parity: Parity) -> list[tuple[Node, Node]]:
    equal = "equal bit for bit" if parity.images_bit_equal else "not equal"
    pairs: list[tuple[Node, Node]] = [
        ("images before and after packing", equal),
        ("largest difference of a latent", number(parity.latent_max_abs)),
    ]
    if parity.integer_rel_l2 is not None:
        pairs += [
            ("integer arithmetic, worst layer's relative L2", number(parity.integer_rel_l2)),
            ("bound on it", number(parity.integer_bound, 2)),
            ("that layer", code(str(parity.integer_layer))),
            ("integer arithmetic, relative L2 of the final latent", number(parity.integer_latent_rel_l2)),
        ]
    return pairs
