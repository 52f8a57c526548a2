"""The family of Qwen-Image 2.1, whose text tokens are modulated by timestep 0 and its image tokens by the real one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import DenoiserFamily

_PREPARED = "_edadm_two_timesteps_per_row"


def _prepare(denoiser: nn.Module) -> None:
    """Gives every row two timesteps, its own and 0, where the denoiser appends one row of timestep 0 to all rows.

    The embeddings then have the shape `(R, 2, C)` instead of `(R + 1, C)`, so that their first dimension counts the
    rows, and a calibration set can be cut into batches. The blocks get what they expect.
    """
    model: Any = denoiser
    if not model.config.causal_condition or getattr(model, _PREPARED, False):
        return
    embedder = model.time_text_embed
    project = embedder.time_proj.forward
    embedder.time_proj.forward = lambda timestep: _two_per_row(project(timestep))
    for block in model.transformer_blocks:
        block.forward = _with_one_row_more(block.forward)
    model.norm_out.forward = partial(_normalized, model.norm_out)
    setattr(model, _PREPARED, True)


def _two_per_row(rows: Tensor) -> Tensor:
    """Returns `(R, 2, C)` from the `R + 1` rows of a batch whose last row belongs to all others."""
    return torch.stack([rows[:-1], rows[-1:].expand_as(rows[:-1])], dim=1)


def _with_one_row_more(forward: Any) -> Any:
    """Returns a forward that turns its arguments of shape `(R, 2, C)` by timestep into `(R + 1, C)`."""

    def joined(value: Any) -> Any:
        is_pair = isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == 2
        return torch.cat([value[:, 0], value[-1:, 1]]) if is_pair else value

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden_states, *map(joined, args), **{name: joined(value) for name, value in kwargs.items()})

    return call


def _normalized(norm: Any, hidden_states: Tensor, embedding: Tensor, target_token_mask: Tensor) -> Tensor:
    """Returns the output of the last norm from embeddings of shape `(R, 2, C)`."""
    scales = norm.linear(norm.silu(embedding).to(hidden_states.dtype))
    scale = torch.where(target_token_mask.view(1, -1, 1), scales[:, :1], scales[:, 1:])
    normalized: Tensor = norm.norm(hidden_states) * (1 + scale)
    return normalized


QWEN_IMAGE21 = DenoiserFamily(
    name="qwen-image 2.1",
    denoisers=("QwenImage21Transformer2DModel",),
    masks={"encoder_hidden_states_mask": "encoder_hidden_states"},
    call_arguments={"use_kv_cache": False},
    prepare=_prepare,
)
FAMILIES = (QWEN_IMAGE21,)
