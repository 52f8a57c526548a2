"""The families of DiT (class-conditional) and PixArt (text to image): transformers with one list of blocks.

References:
    DiT, arXiv 2212.09748; PixArt-Sigma, arXiv 2403.04692.
"""

from __future__ import annotations

import torch
from torch import nn

from edadm_cli.models.families.family import Call, DenoiserFamily
from edadm_cli.models.families.values import ExampleValues

_PIXART_TOKENS = 300
_PROMPT_TOKENS = 20  # of an example prompt; the rest is padding


def _dit(denoiser: nn.Module, values: ExampleValues) -> Call:
    labels = values.labels(values.config.num_embeds_ada_norm)
    return (values.latents(),), {"timestep": values.timestep(), "class_labels": labels}


def _pixart(denoiser: nn.Module, values: ExampleValues) -> Call:
    mask = torch.zeros((values.rows, _PIXART_TOKENS), dtype=values.dtype, device=values.device)
    mask[:, :_PROMPT_TOKENS] = 1
    return (values.latents(),), {
        "encoder_hidden_states": values.normal(_PIXART_TOKENS, values.config.caption_channels),
        "encoder_attention_mask": mask,
        "timestep": values.timestep(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


DIT = DenoiserFamily(
    name="dit",
    denoisers=("DiTTransformer2DModel",),
    blocks={"BasicTransformerBlock": "transformer"},
    conditional_first=("DiTPipeline",),
    calls_per_step=1,
    example_call=_dit,
)
PIXART = DenoiserFamily(
    name="pixart",
    denoisers=("PixArtTransformer2DModel",),
    blocks={"BasicTransformerBlock": "transformer"},
    hiding_masks={"encoder_attention_mask": "encoder_hidden_states"},
    calls_per_step=1,
    example_call=_pixart,
)
FAMILIES = (DIT, PIXART)
