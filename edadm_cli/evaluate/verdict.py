"""Summarizes the quality of an export in sentences: broken images, and how its error grows."""

from __future__ import annotations

from edadm_cli.artifacts import OneStepError
from edadm_cli.evaluate.images import SampledImages

_BLACK_LEVEL = 4.0
"""Mean level out of 255 below which an image looks black."""
_LARGE_GROWTH = 4.0


def verdict(
    images: SampledImages, reference: SampledImages, one_step: OneStepError | None, cache: str | None = None
) -> list[str]:
    """Returns sentences about a set of images, problems first.

    Values that are not finite do not occur here, because sampling refuses them.

    Args:
        images: The quantized pipeline's images.
        reference: The full-precision images of the same seeds.
        one_step: The one-step error; `None` if it could not be measured.
        cache: The step cache that the images were sampled with; `None` without one.
    """
    sentences = []
    for name, count in _broken(images, reference).items():
        sentences.append(f"{count:,} of {len(images):,} images are {name}, and those of full precision are not.")
    if not sentences:
        sentences.append("No image is black or of one flat colour where full precision is not.")
    if one_step is not None and one_step.growth:
        error = one_step.rel_l2 if one_step.guided_rel_l2 is None else one_step.guided_rel_l2
        kind = "one-step error" if one_step.guided_rel_l2 is None else "guided one-step error"
        last = one_step.growth[-1]
        adds_up = error > 0 and last / error > _LARGE_GROWTH
        sentences.append(
            f"The {kind} is {error:.3g}; before the last of {images.plan.num_steps} steps the trajectories are "
            f"{last:.3g} apart{', so the errors of the steps add up' if adds_up else ''}."
        )
        if cache is not None:
            sentences.append(f"Both are those of the export without the cache {cache}; the other metrics are with it.")
    return sentences


def _broken(images: SampledImages, reference: SampledImages) -> dict[str, int]:
    """Returns the number of images that are black, or flat, while the full-precision image of the same seed is not."""
    black = flat = 0
    for (levels, _), (others, _) in zip(images.pairs(), reference.pairs(), strict=True):
        first, second = levels.float().flatten(1), others.float().flatten(1)
        is_flat = first.amax(dim=1) == first.amin(dim=1)
        was_flat = second.amax(dim=1) == second.amin(dim=1)
        is_black, was_black = first.mean(dim=1) < _BLACK_LEVEL, second.mean(dim=1) < _BLACK_LEVEL
        black += int((is_black & ~was_black).sum())
        flat += int((is_flat & ~was_flat & ~is_black).sum())
    return {name: count for name, count in (("black", black), ("of one flat colour", flat)) if count}
