"""Metrics of a set of images in the features of a network; the arithmetic is in `edadm_cli.metrics.fidelity`."""

from __future__ import annotations

from typing import Any

from edadm_cli.errors import InputError
from edadm_cli.metrics.base import INCEPTION, NEIGHBOURS, Context, Metric, Need, Value
from edadm_cli.metrics.representation import Layer


class InFeatures(Metric):
    """A metric that has one name in Inception features and another in those of a shipped classifier.

    Args:
        name: Its name.
        label: Its label.
        inception: Whether it is the one in Inception features; `None` for a name that both share.
    """

    needs: frozenset[Need] = frozenset({"features"})

    def __init__(self, name: str, label: str, inception: bool | None = None) -> None:
        self.name, self.label, self._inception = name, label, inception

    def applies(self, space: str) -> bool:
        """Returns whether the name belongs to the features: `fid`, `sfid` and `kid` are for Inception features only."""
        return self._inception is None or self._inception == (space == INCEPTION)

    def _value(self, context: Context, value: float, num_images: int | None = None) -> Value:
        count = len(context.images) if num_images is None else num_images
        return Value(value, f"{context.feature_name}/{self.layer}", count)


class FrechetDistance(InFeatures):
    """The Fréchet distance of the normal distributions of generated and real features.

    Args:
        name: Its name.
        label: Its label.
        inception: See `InFeatures`.
        layer: Layer of the features.
    """

    better = "lower"
    description = "Fréchet distance to the real images"
    needs = frozenset({"features", "real_statistics"})

    def __init__(self, name: str, label: str, inception: bool, layer: Layer = "pooled") -> None:
        super().__init__(name, label, inception)
        self.layer = layer

    def compute(self, context: Context, resource: Any) -> Value:
        """See `fidelity.frechet_distance`."""
        from edadm_cli.metrics.fidelity import feature_statistics, frechet_distance

        statistics = feature_statistics(context.features(context.images).layer(self.layer))
        real = context.real_statistics(self.layer)
        if statistics.mean.shape != real.mean.shape:
            raise InputError(
                f"The statistics of the real images have {real.mean.size} features, while {context.feature_name} has "
                f"{statistics.mean.size}: they belong to another feature extractor."
            )
        return self._value(context, frechet_distance(statistics, real))


class KernelDistance(InFeatures):
    """The unbiased maximum mean discrepancy of generated and real features."""

    better = "lower"
    description = "kernel distance to the real images"
    needs = frozenset({"features", "real_images"})

    def compute(self, context: Context, resource: Any) -> Value:
        """See `fidelity.kernel_distance`."""
        from edadm_cli.metrics.fidelity import kernel_distance

        pooled = context.features(context.images).pooled
        return self._value(context, kernel_distance(pooled, context.real_features().pooled))


class ClassifierScore(InFeatures):
    """The Inception score, or the same score with another classifier."""

    better = "higher"
    description = "how sure and how varied the classifier's answers are"
    layer: Layer = "logits"

    def compute(self, context: Context, resource: Any) -> Value:
        """See `fidelity.inception_score`."""
        from edadm_cli.metrics.fidelity import inception_score

        return self._value(context, inception_score(context.features(context.images).logits))


class Manifold(InFeatures):
    """Precision or recall: the share of one set within the manifold of the other.

    Args:
        name: `precision` or `recall`.
        label: Its label.
        place: 0 for precision, 1 for recall.
    """

    better = "higher"
    description = "share of images within the manifold of the other set"
    needs = frozenset({"features", "real_images"})
    min_images = NEIGHBOURS + 1

    def __init__(self, name: str, label: str, place: int) -> None:
        super().__init__(name, label)
        self._place = place

    def compute(self, context: Context, resource: Any) -> Value:
        """See `fidelity.precision_recall`."""
        from edadm_cli.metrics.fidelity import precision_recall

        both = context.once(
            "precision_recall",
            lambda: precision_recall(context.features(context.images).pooled, context.real_features().pooled),
        )
        return self._value(context, both[self._place])


class PromptAccuracy(InFeatures):
    """The share of prompts that name a class whose image the classifier reads as that class."""

    better = "higher"
    description = "share of images that show what the prompt names"
    needs = frozenset({"features", "prompts", "labels"})
    percent = True
    layer: Layer = "logits"

    def compute(self, context: Context, resource: Any) -> Value:
        """See `fidelity.prompt_accuracy`."""
        from edadm_cli.metrics.fidelity import prompt_accuracy

        assert context.labels is not None
        named = context.labels >= 0
        logits = context.features(context.images).logits
        return self._value(context, prompt_accuracy(logits[named], context.labels[named]), int(named.sum()))


class PromptAmongFive(PromptAccuracy):
    """The share of prompts that name a class which is among the five best of the image, for 500 classes and more."""

    description = "share of images for which the name of the prompt is among the five best"

    def applies(self, space: str) -> bool:
        """Returns whether the space has many classes, as that of the emoji has."""
        return space == "emoji"

    def compute(self, context: Context, resource: Any) -> Value:
        """Computes the share of images whose prompted class has one of the five highest logits."""
        assert context.labels is not None
        named = context.labels >= 0
        logits, labels = context.features(context.images).logits[named], context.labels[named]
        hits = (logits.topk(5).indices == labels.to(logits.device)[:, None]).any(1)
        return self._value(context, float(hits.double().mean()), int(named.sum()))


METRICS: tuple[Metric, ...] = (
    FrechetDistance("frechet_distance", "Fréchet distance", inception=False),
    FrechetDistance("spatial_frechet_distance", "Fréchet distance, spatial", inception=False, layer="spatial"),
    FrechetDistance("fid", "FID", inception=True),
    FrechetDistance("sfid", "sFID", inception=True, layer="spatial"),
    KernelDistance("kernel_distance", "Kernel distance", inception=False),
    KernelDistance("kid", "KID", inception=True),
    ClassifierScore("classifier_score", "Classifier score", inception=False),
    ClassifierScore("inception_score", "Inception score", inception=True),
    Manifold("precision", "Precision", 0),
    Manifold("recall", "Recall", 1),
    PromptAccuracy("prompt_accuracy", "Prompt accuracy", inception=False),
    PromptAmongFive("prompt_among_five", "Prompt among five", inception=False),
)
