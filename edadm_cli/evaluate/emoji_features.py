"""The picture encoder of the emoji models as a feature extractor of torch-fidelity, and the real emoji."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import file_sha256
from edadm_cli.evaluate.features import FeatureSpace, NetworkExtractor, open_extractor
from edadm_cli.evaluate.real import RealImages, files_digest
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.metrics.representation import Layer, Statistics
from edadm_cli.models.emoji import data
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


def emoji_digest() -> str:
    """Returns the hash of both encoders' weights; metrics in these features are comparable only if it is equal."""
    shared = data.model_folder("shared")
    parts = [(name, file_sha256(shared / name / "model.safetensors")) for name in ("picture_encoder", "text_encoder")]
    return files_digest(parts)


def shipped_emoji() -> RealImages:
    """Returns the real emoji: statistics of the training pictures, and the pictures with held-out names.

    Raises:
        InputError: The shipped files are missing.
    """
    folder = data.model_folder("data")
    stored = data.real_statistics()
    kinds: dict[Layer, str] = {"pooled": "features", "spatial": "spatial"}
    statistics = {
        layer: Statistics(stored[f"{kind}_mean"].numpy(), stored[f"{kind}_cov"].numpy())
        for layer, kind in kinds.items()
    }
    pictures = data.real_pictures()
    return RealImages(
        name="emoji (Fréchet distances: 18,826 training pictures; others: 967 pictures with held-out names)",
        images_name="967 emoji with held-out names",
        digest=files_digest(
            [(name, file_sha256(folder / name)) for name in (data.STATISTICS_FILE, data.PICTURES_FILE)]
        ),
        statistics=statistics,
        images=lambda size: ArrayImages(pictures),
    )
