"""The family of Lumina 2, which joins text and image in one sequence. The longest prompt of a call sets its length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import DenoiserFamily

_PREPARED = "_edadm_sequences_of_one_length"


def _prepare(denoiser: nn.Module) -> None:
    """Gives every joint sequence the length of the padded prompt plus the image, and a mask.

    The denoiser itself takes the length from the longest prompt of a call, and omits the mask if all prompts have the
    same length. Both depend on the lengths that its embedder returns. A hook appends two lengths that belong to no row:
    the full length, which sets the size, and zero, which makes the lengths differ.
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
