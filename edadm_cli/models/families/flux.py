"""The family of FLUX and of transformers that are built like it.

Their latents are packed into tokens. Blocks with two streams come first, and blocks with one stream follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import Call, DenoiserFamily
from edadm_cli.models.families.values import ExampleValues

_T5_TOKENS = 256
_FLUX2_TOKENS = 512
_GUIDANCE = 3.5


def _flux(denoiser: nn.Module, values: ExampleValues) -> Call:
    height, width = values.size[0] // 2, values.size[1] // 2  # a token holds 2 x 2 latents
    guidance = values.timestep(_GUIDANCE) if values.config.guidance_embeds else None
    return (), {
        "hidden_states": values.normal(height * width, values.config.in_channels),
        "timestep": values.timestep(values.TIMESTEP / 1000).to(values.dtype),
        "guidance": guidance,
        "pooled_projections": values.normal(values.config.pooled_projection_dim),
        "encoder_hidden_states": values.normal(_T5_TOKENS, values.config.joint_attention_dim),
        "txt_ids": torch.zeros(_T5_TOKENS, 3, dtype=values.dtype, device=values.device),
        "img_ids": _positions(height, width, 3, values).to(values.dtype),
        "joint_attention_kwargs": {},
    }


def _flux2(denoiser: nn.Module, values: ExampleValues) -> Call:
    height, width = values.size[0] // 2, values.size[1] // 2
    text = torch.zeros(_FLUX2_TOKENS, 4, dtype=torch.int64, device=values.device)
    text[:, 3] = torch.arange(_FLUX2_TOKENS, device=values.device)
    guidance = values.timestep(_GUIDANCE) if values.config.guidance_embeds else None
    return (), {
        "hidden_states": values.normal(height * width, values.config.in_channels),
        "timestep": values.timestep(values.TIMESTEP / 1000).to(values.dtype),
        "guidance": guidance,
        "encoder_hidden_states": values.normal(_FLUX2_TOKENS, values.config.joint_attention_dim),
        "txt_ids": text.expand(values.rows, -1, -1),
        "img_ids": _positions(height, width, 4, values).expand(values.rows, -1, -1),
        "joint_attention_kwargs": {},
    }


def _positions(height: int, width: int, axes: int, values: ExampleValues) -> Tensor:
    """Returns the position of each token, `(height * width, axes)`: its row on axis 1 and its column on axis 2."""
    positions = torch.zeros(height, width, axes, dtype=torch.int64, device=values.device)
    positions[..., 1] = torch.arange(height, device=values.device)[:, None]
    positions[..., 2] = torch.arange(width, device=values.device)[None, :]
    return positions.reshape(-1, axes)


FLUX = DenoiserFamily(
    name="flux",
    denoisers=("FluxTransformer2DModel",),
    example_call=_flux,
)
FLUX2 = DenoiserFamily(
    name="flux 2",
    denoisers=("Flux2Transformer2DModel",),
    shared_arguments=(),
    calls_per_step=2,
    example_call=_flux2,
)
CHROMA = DenoiserFamily(
    name="chroma",
    denoisers=("ChromaTransformer2DModel",),
    calls_per_step=2,
)
FAMILIES = (FLUX, FLUX2, CHROMA)
