"""Summarizes an export in sentences: which layers compute in which width, and whether images are broken."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from edadm_cli.quant.plan import QuantizationPlan

_BLACK_LEVEL = 4.0
"""Mean level out of 255 below which an image looks black."""


def layers_by_width(plan: QuantizationPlan) -> dict[str, int]:
    """Returns the number of layers by width, such as `w4a8`; `float` counts those left in float."""
    widths = Counter(
        layer.width + ("" if layer.activation_bits else " with float inputs") for layer in plan.layers.values()
    )
    counts = dict(sorted(widths.items()))
    return {**counts, "float": len(plan.kept)} if plan.kept else counts


def verdict(images: Tensor, plan: QuantizationPlan) -> list[str]:
    """Returns sentences about an export, problems first.

    Values that are not finite do not occur here, because sampling refuses them.

    Args:
        images: 8-bit levels with shape `(N, C, H, W)` that the export sampled.
        plan: The plan, which says which layers are quantized.
    """
    levels = images.float().flatten(1)
    is_black = levels.mean(dim=1) < _BLACK_LEVEL
    is_flat = (levels.amax(dim=1) == levels.amin(dim=1)) & ~is_black
    counts = {"black": int(is_black.sum()), "of one flat colour": int(is_flat.sum())}
    sentences = [
        f"{count} of {len(images)} sampled images are {kind}: compare with full precision (edadm evaluate)."
        for kind, count in counts.items()
        if count
    ]
    widths = layers_by_width(plan)
    quantized = ", ".join(f"{count:,} in {_shown(width)}" for width, count in widths.items() if width != "float")
    left = widths.get("float", 0)
    sentences.append(f"Layers: {quantized or 'none quantized'}{f', {left:,} left in floating point' if left else ''}.")
    return sentences


def _shown(width: str) -> str:
    """Returns a width in capitals, such as `W8A8`, and the words behind it as they are."""
    bits, *words = width.split()
    return " ".join([bits.upper(), *words])
