"""The picture-and-name encoder, from which the emoji models have their features, prompt score and retrieval metrics.

A small convolutional network maps a picture to a unit vector. The text encoder that both pipelines share maps a prompt
to a unit vector of the same space. The two are trained together on pictures and captions with a contrastive loss.

References:
    Learning transferable visual models from natural language supervision, arXiv 2103.00020, section 2.3.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from edadm_cli.errors import UsageError
from edadm_cli.models.emoji.captions import MAX_TOKENS, STYLES, prompt_of
from edadm_cli.models.emoji.data import WEIGHTS, model_folder, names
from edadm_cli.models.quiet import quiet_libraries

EMBEDDING = 192
INPUT_SIZE = 64
SPATIAL_CHANNELS = 4
_WIDTHS = (32, 64, 96, 160)


class PictureFeatures(NamedTuple):
    """Holds the outputs of the encoder for `B` pictures.

    Attributes:
        features: The globally averaged late activations, with shape `(B, 160)`.
        spatial: A part of an earlier feature map, with shape `(B, 4, 8, 8)`.
        embedding: The unit vectors, with shape `(B, 192)`.
    """

    features: Tensor
    spatial: Tensor
    embedding: Tensor


class _Residual(nn.Module):
    """A residual block: two convolutions, each after a normalization, are added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Returns a feature map `(B, out_channels, H, W)` for one with shape `(B, in_channels, H, W)`."""
        hidden = self.conv1(functional.silu(self.norm1(images)))
        shortcut: Tensor = self.shortcut(images)
        return shortcut + self.conv2(functional.silu(self.norm2(hidden)))


class PictureEncoder(nn.Module):
    """Maps pictures to features of two depths, and to unit vectors in the space that they share with prompts."""

    num_features = _WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTHS[0], 3, padding=1)
        pairs = zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, strict=False)
        self.stages = nn.ModuleList([_Residual(before, after) for before, after in pairs])
        self.norm = nn.GroupNorm(8, self.num_features)
        self.projection = nn.Linear(self.num_features, EMBEDDING, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, images: Tensor) -> PictureFeatures:
        """Returns features and embeddings of pictures with shape `(B, 3, H, W)` and values in [0, 1].

        Raises:
            UsageError: The pictures have another shape, or are not floating-point numbers.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            actual = f"{images.dtype} with shape {tuple(images.shape)}"
            raise UsageError(f"The encoder takes floating-point pictures with shape (B, 3, H, W), found {actual}.")
        if images.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            images = functional.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        hidden = self.stem(images * 2 - 1)  # [B, 32, 64, 64]
        spatial = hidden
        for number, stage in enumerate(self.stages):
            hidden = functional.avg_pool2d(stage(hidden), 2)
            if number == 2:
                spatial = hidden[:, :SPATIAL_CHANNELS]  # [B, 4, 8, 8]
        features = functional.silu(self.norm(hidden)).mean(dim=(2, 3))
        return PictureFeatures(features, spatial, functional.normalize(self.projection(features), dim=-1))


def load_picture_encoder(device: str | torch.device = "cpu", root: Path = WEIGHTS) -> PictureEncoder:
    """Loads the trained picture encoder in float32, ready for evaluation.

    Raises:
        InputError: The weights are missing.
    """
    encoder = PictureEncoder()
    state = load_file(model_folder("shared", root) / "picture_encoder" / "model.safetensors")
    encoder.load_state_dict({name: value.float() for name, value in state.items()})
    return encoder.to(device).eval().requires_grad_(False)


@cache
@torch.no_grad()
def name_vectors(root: Path = WEIGHTS) -> Tensor:
    """Returns one unit vector per retrieval name, `(500, 192)`: the normalized mean over its prompts in all styles."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    shared = model_folder("shared", root)
    with quiet_libraries():
        tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextModelWithProjection.from_pretrained(
            shared / "text_encoder", local_files_only=True, dtype=torch.float32
        ).eval()
    retrieval = names(root)["retrieval"]
    total = torch.zeros(len(retrieval), EMBEDDING)
    for style in STYLES.values():
        prompts = [prompt_of(name, style) for name in retrieval]
        tokens = tokenizer(prompts, padding=True, max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        total += functional.normalize(text_encoder(tokens.input_ids).text_embeds, dim=-1)
    return functional.normalize(total, dim=-1)
