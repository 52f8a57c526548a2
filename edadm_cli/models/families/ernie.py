"""The family of ERNIE-Image, whose blocks compute with tensors of shape `(tokens, rows, channels)`."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import DenoiserFamily


def _prepare(denoiser: nn.Module) -> None:
    """Makes the denoiser and its blocks compute with rows first, so that what they pass on can be cut by row.

    Each token is computed as before: only the order of the dimensions differs.
    """
    model: Any = denoiser
    if "forward" in vars(model):
        return
    model.forward = MethodType(_predict, model)
    for block in model.layers:
        block.forward = MethodType(_block, block)


def _predict(
    model: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    text_bth: Tensor,
    text_lens: Tensor,
    return_dict: bool = True,
) -> Any:
    """Returns the prediction `(R, C, H, W)` for a noisy sample of this shape and text states `(R, L, D)`."""
    from diffusers.models.transformers.transformer_ernie_image import ErnieImageTransformer2DModelOutput as Output

    patch = model.patch_size
    height, width = (size // patch for size in hidden_states.shape[-2:])
    image = model.x_embedder(hidden_states)  # [R, T, D]
    text = text_bth if model.text_proj is None or not text_bth.numel() else model.text_proj(text_bth)
    positions = model.pos_embed(_positions(height, width, text.shape[1], text_lens))
    mask = _mask(image.shape[1], text.shape[1], text_lens)
    embedding = model.time_embedding(model.time_proj(timestep).to(hidden_states.dtype))
    modulation = [part.unsqueeze(1) for part in model.adaLN_modulation(embedding).chunk(6, dim=-1)]
    tokens = torch.cat([image, text], dim=1)
    for block in model.layers:
        tokens = block(tokens, positions, modulation, mask)
    normalized = model.final_norm(tokens.transpose(0, 1), embedding).transpose(0, 1).type_as(tokens)
    patches = model.final_linear(normalized)[:, : image.shape[1]]
    prediction = patches.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    prediction = prediction.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return Output(sample=prediction) if return_dict else (prediction,)


def _block(block: Any, x: Tensor, rotary_pos_emb: Tensor, temb: list[Tensor], attention_mask: Tensor) -> Tensor:
    """Returns the output of a block for tokens `(R, T, D)`; each tensor of `temb` has the shape `(R, 1, D)`."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (part.float() for part in temb)
    modulated = (block.adaLN_sa_ln(x).float() * (1 + scale) + shift).to(x.dtype)
    attended = block.self_attention(modulated, attention_mask=attention_mask, image_rotary_emb=rotary_pos_emb)
    x = x + (gate * attended.float()).to(x.dtype)
    modulated = (block.adaLN_mlp_ln(x).float() * (1 + scale_mlp) + shift_mlp).to(x.dtype)
    return x + (gate_mlp * block.mlp(modulated).float()).to(x.dtype)


def _positions(height: int, width: int, num_text_tokens: int, text_lens: Tensor) -> Tensor:
    """Returns three positions per token, with shape `(R, height * width + L, 3)`.

    Those of an image token are the length of the row's text and the token's place; those of a text token are its number
    and zeros.
    """
    device, rows = text_lens.device, len(text_lens)
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (height, width)]
    places = torch.cartesian_prod(*axes).expand(rows, -1, -1)
    lengths = text_lens.float().view(-1, 1, 1).expand(-1, height * width, -1)
    numbers = torch.arange(num_text_tokens, device=device, dtype=torch.float32).view(1, -1, 1).expand(rows, -1, -1)
    text = torch.cat([numbers, torch.zeros_like(numbers).expand(-1, -1, 2)], dim=-1)
    return torch.cat([torch.cat([lengths, places], dim=-1), text], dim=1)


def _mask(num_image_tokens: int, num_text_tokens: int, text_lens: Tensor) -> Tensor:
    """Returns a mask that is true for image tokens and for the text of each row, with shape `(R, 1, 1, T)`."""
    is_text = torch.arange(num_text_tokens, device=text_lens.device) < text_lens.view(-1, 1)
    is_image = torch.ones(len(text_lens), num_image_tokens, dtype=torch.bool, device=text_lens.device)
    return torch.cat([is_image, is_text], dim=1)[:, None, None, :]


ERNIE = DenoiserFamily(
    name="ernie-image",
    denoisers=("ErnieImageTransformer2DModel",),
    block_lists=("layers",),
    calls_per_step=1,
    prepare=_prepare,
)
FAMILIES = (ERNIE,)
