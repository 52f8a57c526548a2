"""The feature extractors for the comparison of sets of images, registered with torch-fidelity.

`digits` is the shipped classifier. `inception-v3-spatial` is torch-fidelity's port of the Inception network of 2015,
which also returns the first seven channels of the 17x17 map `mixed_6/conv`.

References:
    Nash et al., Generating Images with Sparse Representations (arXiv 2103.03841), section 5.2: the spatial
    variant; Dhariwal and Nichol (arXiv 2105.05233): the same map in their evaluation.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from edadm_cli.artifacts.tensors import load_pickled_tensors
from edadm_cli.errors import InputError
from edadm_cli.evaluate.datasets import is_offline
from edadm_cli.evaluate.digests import require_weights
from edadm_cli.hooks import Hooks
from edadm_cli.metrics.representation import LAYERS, Features
from edadm_cli.models.digits.classifier import load_classifier

SPATIAL_CHANNELS = 7
_BATCH_SIZE = 50


class NetworkExtractor(FeatureExtractorBase):
    """A network of this package as a feature extractor of torch-fidelity, for uint8 images `(B, 3, H, W)`."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)

    @abstractmethod
    def named_features(self, images: Tensor) -> dict[str, Tensor]:
        """Returns pooled features, a spatial map and logits under the names of `LAYERS`."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the requested features, each with shape `(B, *)` flattened to two dimensions."""
        features = self.named_features(images)
        return tuple(features[layer].flatten(1) for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Returns the names of the available features."""
        return LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Returns the features that a metric of torch-fidelity uses unless another is named."""
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        """Returns `False`: the network is small, and its values shall not depend on a compiler."""
        return False


class DigitsExtractor(NetworkExtractor):
    """The digit classifier."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier("cpu")

    def named_features(self, images: Tensor) -> dict[str, Tensor]:
        """See `NetworkExtractor.named_features`."""
        result = self.classifier(images.float() / 255.0)
        return {"pooled": result.features, "spatial": result.spatial, "logits": result.logits}


class InceptionExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception network with spatial features, for uint8 images `(B, 3, H, W)`."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, ["2048", "logits_unbiased"], **kwargs)
        self.requested = list(features_list)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the requested features, each flattened to two dimensions."""
        maps: list[Tensor] = []
        with Hooks() as hooks:
            hooks.after(
                self.Mixed_6d.branch1x1,
                lambda module, inputs, output: maps.append(output[:, :SPATIAL_CHANNELS].flatten(1).float()),
            )
            pooled, logits = super().forward(images)
        named = {"pooled": pooled, "spatial": maps[0], "logits": logits}  # [B, 2048], [B, 2023], [B, 1008]
        return tuple(named[layer] for layer in self.requested)

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Returns the features of `forward` by name."""
        return dict(zip(self.requested, features, strict=True))

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Returns the features that a metric of torch-fidelity uses unless another is named."""
        return "logits" if metric == "isc" else "pooled"


@dataclass(frozen=True)
class FeatureSpace:
    """A feature extractor on its device.

    Args:
        extractor: A registered extractor with the three `LAYERS`.
        device: The device that it runs on.
    """

    extractor: FeatureExtractorBase
    device: torch.device

    def extract(self, images: Dataset[Tensor]) -> Features:
        """Returns the features of a set of uint8 images with shape `(3, H, W)`."""
        is_cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if is_cuda else nullcontext():
            features = get_featuresdict_from_dataset(
                images, self.extractor, _BATCH_SIZE, cuda=is_cuda, save_cpu_ram=True, verbose=False
            )
        return Features(**features)


def digits_space(device: torch.device) -> FeatureSpace:
    """Loads the shipped digit classifier.

    Raises:
        InputError: Its weights are missing.
    """
    return open_extractor("digits", device, DigitsExtractor)


def inception_space(weights: Path | None, device: torch.device) -> FeatureSpace:
    """Loads the Inception network of 2015 from a file, or from torch-fidelity's cache (downloaded once).

    Raises:
        InputError: The file is missing or holds something else, or no file is given and the download fails.
    """
    path = weights if weights is not None else _downloaded_inception()
    check_inception_weights(path)
    try:
        return open_extractor(
            "inception-v3-spatial", device, InceptionExtractor, feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:  # the names or the shapes do not fit
        raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception network.") from error


def check_inception_weights(path: Path) -> None:
    """Checks that a file of weights holds tensors only; torch-fidelity itself would run code of the file.

    Raises:
        InputError: The file is missing, is not a file of weights, or holds objects that are not tensors.
    """
    require_weights(path)
    load_pickled_tensors(path)


def open_extractor(
    name: str, device: torch.device, extractor_class: type[FeatureExtractorBase], **kwargs: Any
) -> FeatureSpace:
    """Registers a feature extractor with torch-fidelity under a name, once, and returns it on a device."""
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, extractor_class)
    extractor = create_feature_extractor(name, list(LAYERS), cuda=False, verbose=False, **kwargs)
    return FeatureSpace(extractor.to(device), device)


def _downloaded_inception() -> Path:
    """Returns torch-fidelity's file of the Inception weights, which is downloaded if it is missing."""
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    hint = f"download {URL_INCEPTION_V3} elsewhere and give it with --inception-weights FILE"
    if is_offline():
        raise InputError(
            f"The Inception weights were expected in {path} and are missing; HF_HUB_OFFLINE forbids a download.",
            hint=hint,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The Inception weights are not in {path} and cannot be downloaded: {error}.", hint=hint
        ) from error
    return path
