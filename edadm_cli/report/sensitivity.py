"""The section about the error of each layer at each number of bits."""

from __future__ import annotations

from edadm_cli.artifacts import LayerSensitivity
from edadm_cli.report.contents import RunContents
from edadm_cli.report.formats import count, number
from edadm_cli.report.html import Html, Node, code, details, element, section, table

_NUM_SHOWN = 12


def sensitivity_section(contents: RunContents) -> Html | None:
    """Returns the section with the layers by their error, the largest first; `None` if it was not measured."""
    if contents.sensitivity is None:
        return None
    result = contents.sensitivity.facts
    fewest = min(bits for layer in result.layers for bits in layer.weight_errors)
    layers = result.ranked(fewest)
    weight_bits = sorted({bits for layer in layers for bits in layer.weight_errors})
    activation_bits = sorted({bits for layer in layers for bits in layer.activation_errors})
    lead = (
        f"Predicted relative L2 distance of the final sample when one layer alone is quantized, over "
        f"{count(result.num_samples, 'sample')}; the layers that lose most at {fewest} bits per weight come first."
    )
    header = ["layer", "weights", *(f"W{bits}" for bits in weight_bits), *(f"A{bits}" for bits in activation_bits)]

    def rows(shown: list[LayerSensitivity]) -> list[list[Node]]:
        return [
            [
                code(layer.name),
                f"{layer.num_weights:,}",
                *(_distance(layer.weight_errors.get(bits)) for bits in weight_bits),
                *(_distance(layer.activation_errors.get(bits)) for bits in activation_bits),
            ]
            for layer in shown
        ]

    numeric = range(1, len(header))
    first = table(header, rows(layers[:_NUM_SHOWN]), "Most sensitive layers", numeric)
    every = table(header, rows(layers), "All layers by sensitivity", numeric)
    return section(
        "sensitivity",
        "Sensitivity",
        element("p", lead, class_="lead"),
        first,
        details(f"All {count(len(layers), 'layer')}", every) if len(layers) > _NUM_SHOWN else None,
    )


def _distance(error: float | None) -> str:
    return number(None if error is None else error**0.5, 3)
