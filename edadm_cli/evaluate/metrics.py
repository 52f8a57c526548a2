"""Which figures a model is judged by, what each needs, and which of them cannot be had here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edadm_cli.errors import InputError, UsageError
from edadm_cli.evaluate.representation import Layer

NEIGHBOURS = 3
"""Nearest neighbours that span the manifolds of precision and recall."""

Quantity = Literal["frechet", "kernel", "score", "precision", "recall", "prompt_accuracy", "clip_score"]


@dataclass(frozen=True)
class MetricSpec:
    """One figure.

    Args:
        quantity: What is computed.
        layer: The features it is computed in; the CLIP score has its own.
        by_default: Whether it is computed unless other figures are named.
    """

    quantity: Quantity
    layer: Layer
    by_default: bool = True

    @property
    def needs_real(self) -> bool:
        """Whether samples are compared with real images."""
        return self.quantity in ("frechet", "kernel", "precision", "recall")

    @property
    def needs_real_images(self) -> bool:
        """Whether statistics of real images are not enough."""
        return self.needs_real and self.quantity != "frechet"


_COMMON = {
    "precision": MetricSpec("precision", "pooled"),
    "recall": MetricSpec("recall", "pooled"),
}
METRICS: dict[str, dict[str, MetricSpec]] = {
    "digits": {
        "frechet_distance": MetricSpec("frechet", "pooled"),
        "spatial_frechet_distance": MetricSpec("frechet", "spatial"),
        "kernel_distance": MetricSpec("kernel", "pooled"),
        "classifier_score": MetricSpec("score", "logits"),
        **_COMMON,
        "prompt_accuracy": MetricSpec("prompt_accuracy", "logits"),
        "clip_score": MetricSpec("clip_score", "pooled", by_default=False),
    },
    "inception": {
        "fid": MetricSpec("frechet", "pooled"),
        "sfid": MetricSpec("frechet", "spatial"),
        "kid": MetricSpec("kernel", "pooled"),
        "inception_score": MetricSpec("score", "logits"),
        **_COMMON,
        "clip_score": MetricSpec("clip_score", "pooled"),
    },
}
"""Features of a model -> name of each figure. `fid`, `kid` and `sfid` mean Inception, nothing else."""

_PROMPTED: tuple[Quantity, ...] = ("prompt_accuracy", "clip_score")


class MetricChoice:
    """The figures to compute, shrinking as it turns out what is missing.

    Args:
        specs: Every figure the model can have.
        named: The figures that the user named; empty for the default ones.

    Raises:
        UsageError: A named figure does not exist for this model.
    """

    def __init__(self, specs: Mapping[str, MetricSpec], named: Sequence[str]) -> None:
        for name in named:
            if name not in specs:
                raise UsageError(f"There is no figure '{name}' for this model; there are {', '.join(specs)}.")
        self.named = frozenset(named)
        self.wanted = {name: spec for name, spec in specs.items() if (name in named if named else spec.by_default)}
        self.skipped: dict[str, str] = {}

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Do without some figures.

        Raises:
            InputError: One of them was named by the user.
        """
        for name in list(names):
            if name in self.named:
                raise InputError(f"{name} cannot be computed: {reason}")
            del self.wanted[name]
            self.skipped[name] = reason

    def names(self, *quantities: Quantity) -> list[str]:
        """Names of the wanted figures of some quantities."""
        return [name for name, spec in self.wanted.items() if spec.quantity in quantities]

    def in_features(self) -> list[str]:
        """Names of the wanted figures that need the feature extractor."""
        return [name for name, spec in self.wanted.items() if spec.quantity != "clip_score"]

    def forget_prompted(self) -> None:
        """Leave out what is about prompts, for a model that has none; only a named figure is worth a word.

        Raises:
            InputError: One of them was named by the user.
        """
        for name in self.names(*_PROMPTED):
            if name in self.named:
                raise InputError(f"{name} cannot be computed: the model takes no prompts.")
            del self.wanted[name]

    def drop_without_real(self, has_statistics: Iterable[str], has_images: bool) -> None:
        """Leave out what the real images at hand do not allow.

        Args:
            has_statistics: Layers whose real statistics are known.
            has_images: Whether there are real images.
        """
        known = set(has_statistics)
        missing = [
            name
            for name, spec in self.wanted.items()
            if spec.needs_real and not has_images and (spec.needs_real_images or spec.layer not in known)
        ]
        reason = (
            "statistics of real images are not enough for it (--real DIR with the images)."
            if known
            else "there are no real images (--real DIR, or an npz file of statistics)."
        )
        self.drop(missing, reason)

    def drop_too_few(self, num_images: int) -> None:
        """Leave out what needs more images than there are."""
        if num_images <= NEIGHBOURS:
            self.drop(self.names("precision", "recall"), f"it needs more than {NEIGHBOURS} images.")
