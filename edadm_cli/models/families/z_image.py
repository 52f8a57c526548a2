"""The family of Z-Image, which takes one tensor per image and pads text to the longest prompt of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.models.families.family import DenoiserFamily

_TOKENS = 512  # the longest prompt that the pipeline encodes


def _prepare(denoiser: nn.Module) -> None:
    """Pads the text of every call to one length, and always masks the padding.

    The denoiser itself omits the masks if all sequences have the same length.
    """
    model: Any = denoiser
    if "_prepare_sequence" in vars(model):
        return
    prepare_sequence, build_unified = model._prepare_sequence, model._build_unified_sequence

    def sequence(feats: Any, pos_ids: Any, inner_pad_mask: Any, pad_token: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = prepare_sequence(feats, pos_ids, inner_pad_mask, pad_token, *args, **kwargs)
        if pad_token is not model.cap_pad_token:
            return output
        tokens, positions, _, lengths, noise = output
        size = max(_TOKENS, tokens.shape[1])
        return _padded(tokens, size), _padded(positions, size), _mask(lengths, size, tokens), lengths, noise

    def unified(x: Tensor, x_freqs: Tensor, x_lengths: list[int], x_noise: Any, *text: Any, **kwargs: Any) -> Any:
        tokens, positions, _, noise = build_unified(x, x_freqs, x_lengths, x_noise, *text, **kwargs)
        lengths = [image + prompt for image, prompt in zip(x_lengths, text[2], strict=True)]
        size = max(x_lengths) + max(_TOKENS, *text[2])
        return _padded(tokens, size), _padded(positions, size), _mask(lengths, size, tokens), noise

    model._prepare_sequence, model._build_unified_sequence = sequence, unified


def _padded(tokens: Tensor, size: int) -> Tensor:
    return F.pad(tokens, [0, 0] * (tokens.ndim - 2) + [0, size - tokens.shape[1]])


def _mask(lengths: list[int], size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device)
    return places[None, :] < torch.tensor(lengths, device=like.device)[:, None]


Z_IMAGE = DenoiserFamily(
    name="z-image",
    denoisers=("ZImageTransformer2DModel",),
    block_lists=("layers",),
    calls_per_step=1,
    ragged_layers=("cap_embedder",),
    prepare=_prepare,
)
FAMILIES = (Z_IMAGE,)
