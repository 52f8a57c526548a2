"""Lumina 2: text and image in one sequence, which is as long as the longest prompt of a call makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import DenoiserFamily

_PREPARED = "_edadm_sequences_of_one_length"


def _prepare(denoiser: nn.Module) -> None:
    """Makes every joint sequence as long as the padded prompt and the image together, with a mask.

    The denoiser takes the longest prompt of a call for the length and leaves the mask out where all prompts are equally
    long. Its embedder returns the lengths; two more of them, which belong to no row, decide about both.
    """
    embedder: Any = denoiser.rope_embedder
    if getattr(embedder, _PREPARED, False):
        return

    def hook(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        patches, context, noise, joint, text_lengths, lengths = output
        mask: Tensor = args[1]
        longest = mask.shape[1] + lengths[0] - text_lengths[0]
        padding = longest - joint.shape[1]
        joint = torch.cat([joint, joint.new_zeros(joint.shape[0], padding, *joint.shape[2:])], dim=1)
        return patches, context, noise, joint, text_lengths, [*lengths, longest, 0]

    embedder.register_forward_hook(hook)
    setattr(embedder, _PREPARED, True)


LUMINA2 = DenoiserFamily(
    name="lumina 2",
    denoisers=("Lumina2Transformer2DModel",),
    block_lists=("layers",),
    masks={"encoder_attention_mask": "encoder_hidden_states"},
    calls_per_step=2,
    prepare=_prepare,
)
FAMILIES = (LUMINA2,)
