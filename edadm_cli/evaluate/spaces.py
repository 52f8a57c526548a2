"""The feature spaces of metrics: the network, the real images, and the classes that prompts name.

`ModelEntry.features` names the space of a model. A network is imported when it is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.digests import digits_digest, emoji_digest, inception_digest
from edadm_cli.evaluate.efficientnet_weights import FEATURE_NAME as EFFICIENTNET
from edadm_cli.evaluate.efficientnet_weights import WEIGHTS_SHA256, weights_path
from edadm_cli.evaluate.real import RealImages, shipped_digits, shipped_emoji
from edadm_cli.models.digits.data import label_of_prompt
from edadm_cli.models.emoji import data as emoji
from edadm_cli.models.registry import ModelEntry

if TYPE_CHECKING:
    import torch

    from edadm_cli.evaluate.features import FeatureSpace


class Space(ABC):
    """One feature space.

    Attributes:
        feature_name: Name of its features in results.
        is_shipped: Whether the network is part of this package, so that it cannot be missing.
    """

    feature_name: str
    is_shipped: bool = True

    def check(self, config: EvaluateConfig) -> None:  # noqa: B027 - most spaces have nothing to check
        """Refuses unusable weights before anything is sampled.

        Raises:
            InputError: A file that the configuration names is missing or broken.
        """

    @abstractmethod
    def digest(self, config: EvaluateConfig) -> str:
        """Returns a text that identifies the network's weights, such as their hash."""

    @abstractmethod
    def open(self, config: EvaluateConfig, device: torch.device) -> FeatureSpace:
        """Loads the network.

        Raises:
            InputError: Its weights are missing and cannot be downloaded.
        """

    def real_images(self, entry: ModelEntry) -> RealImages | None:
        """Returns the real images that come with the package; `None` if there are none."""
        return None

    def label_of(self, prompt: str) -> int | None:
        """Returns the class that a prompt names; `None` if it names none."""
        return None


class DigitsSpace(Space):
    """The shipped digit classifier, and MNIST."""

    feature_name = "digits"

    def digest(self, config: EvaluateConfig) -> str:
        """Returns the hash of the classifier's weights."""
        return digits_digest()

    def open(self, config: EvaluateConfig, device: torch.device) -> FeatureSpace:
        """Loads the classifier."""
        from edadm_cli.evaluate.features import digits_space

        return digits_space(device)

    def real_images(self, entry: ModelEntry) -> RealImages:
        """Returns MNIST at the size of the model's images."""
        return shipped_digits(entry.image_size or 32)

    def label_of(self, prompt: str) -> int | None:
        """Returns the digit that a prompt names."""
        return label_of_prompt(prompt)


class EmojiSpace(Space):
    """The picture-and-name encoder of the emoji models, and the real emoji; a class is one of 500 names."""

    feature_name = "emoji"

    def digest(self, config: EvaluateConfig) -> str:
        """Returns the hash of the encoders' weights."""
        return emoji_digest()

    def open(self, config: EvaluateConfig, device: torch.device) -> FeatureSpace:
        """Loads the encoder."""
        from edadm_cli.evaluate.emoji_features import emoji_space

        return emoji_space(device)

    def real_images(self, entry: ModelEntry) -> RealImages:
        """Returns the real emoji."""
        return shipped_emoji()

    def label_of(self, prompt: str) -> int | None:
        """Returns the number of the name that a prompt asks for."""
        return emoji.label_of_prompt(prompt)


class InceptionSpace(Space):
    """The Inception network of 2015, in torch-fidelity's port."""

    feature_name = "inception-v3"
    is_shipped = False

    def check(self, config: EvaluateConfig) -> None:
        """Checks the file of weights, if one is named."""
        if config.inception_weights is not None:
            from edadm_cli.evaluate.features import check_inception_weights

            check_inception_weights(config.inception_weights)

    def digest(self, config: EvaluateConfig) -> str:
        """Returns the version of torch-fidelity's weights, or the hash of the file."""
        return inception_digest(config.inception_weights)

    def open(self, config: EvaluateConfig, device: torch.device) -> FeatureSpace:
        """Loads the network."""
        from edadm_cli.evaluate.features import inception_space

        return inception_space(config.inception_weights, device)


class EfficientNetSpace(Space):
    """EfficientNet-Lite0 with ImageNet weights from an optional package, independent of all shipped models."""

    feature_name = EFFICIENTNET

    def check(self, config: EvaluateConfig) -> None:
        """Checks the weights, which are needed only if the user names these features."""
        weights_path()

    def digest(self, config: EvaluateConfig) -> str:
        """Returns the hash of the weights."""
        return WEIGHTS_SHA256

    def open(self, config: EvaluateConfig, device: torch.device) -> FeatureSpace:
        """Loads the network."""
        from edadm_cli.evaluate.efficientnet import efficientnet_space

        return efficientnet_space(device)


SPACES: dict[str, Space] = {
    "digits": DigitsSpace(),
    "emoji": EmojiSpace(),
    "inception": InceptionSpace(),
    EFFICIENTNET: EfficientNetSpace(),
}


def space_of(entry: ModelEntry, features: str | None = None) -> Space:
    """Returns the feature space that `features` names, by default the model's own."""
    return SPACES[features or entry.features]


def real_images(entry: ModelEntry, space: Space) -> RealImages | None:
    """Returns the real images that come with a model, without statistics if the features are not its own."""
    own_space = SPACES[entry.features]
    real = own_space.real_images(entry)
    return real if real is None or space is own_space else real.without_statistics()
