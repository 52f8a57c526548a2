"""The picture encoder of the emoji models as a feature extractor of torch-fidelity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edadm_cli.evaluate.features import FeatureSpace, NetworkExtractor, open_extractor
from edadm_cli.models.emoji.encoder import load_picture_encoder, name_vectors

FEATURE_NAME = "emoji"


class EmojiExtractor(NetworkExtractor):
    """The picture encoder; `logits` are the scores of the 500 retrieval names."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.encoder = load_picture_encoder("cpu")
        self.register_buffer("names", name_vectors())

    def named_features(self, images: Tensor) -> dict[str, Tensor]:
        """See `NetworkExtractor.named_features`."""
        features = self.encoder(images.float() / 255.0)
        logits = self.encoder.log_scale.exp() * features.embedding @ self.names.T
        return {"pooled": features.features, "spatial": features.spatial, "logits": logits}


def emoji_space(device: torch.device) -> FeatureSpace:
    """Loads the picture encoder.

    Raises:
        InputError: Its weights are missing.
    """
    return open_extractor(FEATURE_NAME, device, EmojiExtractor)
