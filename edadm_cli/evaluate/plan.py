"""Decides which metrics an evaluation can compute, and loads the networks and real images that they need.

Nothing here imports a library that computes before something is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import InputError
from edadm_cli.evaluate.real import RealImages, open_real
from edadm_cli.evaluate.request import EvaluationRequest
from edadm_cli.evaluate.selection import MetricSelection
from edadm_cli.evaluate.spaces import real_images, space_of
from edadm_cli.metrics.registry import metrics_of

if TYPE_CHECKING:
    import torch

    from edadm_cli.evaluate.evaluator import Evaluator
    from edadm_cli.evaluate.features import FeatureSpace


class EvaluationPlan:
    """The metrics of one evaluation, before anything is sampled or loaded onto a device.

    Args:
        request: The evaluation.

    Raises:
        UsageError: A metric was named that this model does not have.
        InputError: A metric was named and its needs are not met, or there are no such real images.
    """

    def __init__(self, request: EvaluationRequest) -> None:
        self.request = request
        features = request.config.features or request.entry.features
        self.space = space_of(request.entry, features)
        self._metrics = metrics_of(features)
        self.selection = MetricSelection(self._metrics, request.config.metrics, features)
        self.real = self._open_real()
        self.labels = self._labels(request.sampling.prompts)
        if request.sampling.prompts is None:
            self.selection.forget_prompts()
        elif self.labels is None:
            self.selection.drop(self.selection.needing("labels"), "no prompt names one class of the classifier.")
        real = self.real
        self.selection.drop_without_real(real.layers if real else (), has_images=bool(real and real.images))
        self.selection.drop_too_few(len(request.sampling))

    def identity_fields(self) -> dict[str, Any]:
        """Returns everything but the images that decides the metrics, as JSON values."""
        config = self.request.config
        fields: dict[str, Any] = {
            "real": None if self.real is None else self.real.digest,
            "features": self.space.digest(config),
        }
        for metric in self._metrics.values():
            fields |= metric.identity(config)
        return fields

    def load(self, device: torch.device) -> Evaluator:
        """Loads the networks and the real images; metrics whose network is missing are left out.

        Raises:
            InputError: The user named such a metric, or its weights or the real images are not usable.
        """
        import torch

        from edadm_cli.evaluate.evaluator import Evaluator, RealFeatures

        self.space.check(self.request.config)
        if self.real is not None:
            self.real.fetch()
        space = self._load_space(device)
        resources = self._load_resources(device)
        return Evaluator(
            metrics=dict(self.selection.selected),
            resources=resources,
            feature_name=self.space.feature_name,
            space=space,
            real=RealFeatures(self.real, space) if self.real and space else None,
            prompts=self.request.sampling.prompts,
            labels=None if self.labels is None else torch.tensor(self.labels),
        )

    def _open_real(self) -> RealImages | None:
        if not self.selection.needing("real_images", "real_statistics"):
            return None
        if self.request.config.real is not None:
            return open_real(self.request.config.real)
        return real_images(self.request.entry, self.space)

    def _labels(self, prompts: Sequence[str] | None) -> list[int] | None:
        """Returns the class that each prompt names, -1 for none; `None` if no prompt names one."""
        labels = [self.space.label_of(prompt) for prompt in prompts or ()]
        if all(label is None for label in labels):
            return None
        return [-1 if label is None else label for label in labels]

    def _load_space(self, device: torch.device) -> FeatureSpace | None:
        names = self.selection.needing("features")
        if not names:
            return None
        try:
            return self.space.open(self.request.config, device)
        except InputError as error:
            if self.space.is_shipped or self.request.config.inception_weights is not None:
                raise
            self.selection.drop(names, _reason(error))
            return None

    def _load_resources(self, device: torch.device) -> dict[str, Any]:
        resources = {}
        for name, metric in list(self.selection.selected.items()):
            try:
                resources[name] = metric.open(self.request.config, device)
            except InputError as error:
                self.selection.drop([name], _reason(error))
        return resources


def _reason(error: InputError) -> str:
    return error.message if error.hint is None else f"{error.message.removesuffix('.')} ({error.hint})."
