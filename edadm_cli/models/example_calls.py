"""The call that a pipeline would make of its denoiser, with random values, for each supported class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]

_TIMESTEP = 500
_CLIP_TOKENS = 77
_T5_TOKENS = {"PixArtTransformer2DModel": 300, "SD3Transformer2DModel": 256, "FluxTransformer2DModel": 256}


def example_call(denoiser: nn.Module, *, batch_size: int, seed: int = 0, size: tuple[int, int] | None = None) -> Call:
    """Arguments of one denoiser call, on the denoiser's device and in its element type.

    Args:
        denoiser: A denoiser of diffusers.
        batch_size: Rows: images times guidance branches.
        seed: Seed of the values.
        size: Height and width of the latents, or of the pixels of a model without a decoder; else the model's own.
            A Flux model packs 2 x 2 latents into a token, and its own size is 128 x 128.

    Returns:
        `(args, kwargs)`.

    Raises:
        TypeError: The denoiser is of a class that is not known here.
    """
    build = next((_BUILDERS[c.__name__] for c in type(denoiser).__mro__ if c.__name__ in _BUILDERS), None)
    if build is None:
        raise TypeError(f"There is no example call for {type(denoiser).__name__}.")
    return build(denoiser, _Values(denoiser, batch_size, seed, size))


class _Values:
    """Draws tensors of a call."""

    def __init__(self, denoiser: nn.Module, rows: int, seed: int, size: tuple[int, int] | None) -> None:
        first = next(p for p in denoiser.parameters() if p.is_floating_point())
        self.device, self.dtype, self.rows = first.device, first.dtype, rows
        self.config: Any = denoiser.config
        self.generator = torch.Generator().manual_seed(seed)
        own = getattr(self.config, "sample_size", None) or 128
        self.size = size or (own, own)

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn((self.rows, *shape), generator=self.generator)
        return values.to(self.device, self.dtype)

    def latents(self) -> Tensor:
        return self.normal(self.config.in_channels, *self.size)

    def labels(self, count: int) -> Tensor:
        return torch.randint(count, (self.rows,), generator=self.generator).to(self.device)

    def timestep(self, value: float = _TIMESTEP) -> Tensor:
        """One value a row, as transformers want it."""
        return torch.full((self.rows,), value, device=self.device)


def _unet(denoiser: nn.Module, values: _Values) -> Call:
    kwargs: dict[str, Any] = {}
    if values.config.num_class_embeds:
        kwargs["class_labels"] = values.labels(values.config.num_class_embeds)
    return (values.latents(), torch.tensor(_TIMESTEP, device=values.device)), kwargs


def _conditional_unet(denoiser: nn.Module, values: _Values) -> Call:
    config = values.config
    states = values.normal(_CLIP_TOKENS, config.cross_attention_dim)
    kwargs: dict[str, Any] = {"encoder_hidden_states": states}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        scale = 8 * values.size[0], 8 * values.size[1]
        ids = torch.tensor([*scale, 0, 0, *scale], dtype=values.dtype, device=values.device)
        kwargs["added_cond_kwargs"] = {"text_embeds": values.normal(pooled), "time_ids": ids.repeat(values.rows, 1)}
    return (values.latents(), torch.tensor(_TIMESTEP, device=values.device)), kwargs


def _labelled_unet(denoiser: nn.Module, values: _Values) -> Call:
    num_classes: Any = denoiser.num_classes
    return (values.latents(),), {"timestep": values.timestep(), "class_labels": values.labels(num_classes)}


def _dit(denoiser: nn.Module, values: _Values) -> Call:
    labels = values.labels(values.config.num_embeds_ada_norm)
    return (values.latents(),), {"timestep": values.timestep(), "class_labels": labels}


def _pixart(denoiser: nn.Module, values: _Values) -> Call:
    tokens = _T5_TOKENS["PixArtTransformer2DModel"]
    mask = torch.zeros((values.rows, tokens), dtype=values.dtype, device=values.device)
    mask[:, :20] = 1  # a prompt of twenty tokens, the rest is padding
    return (values.latents(),), {
        "encoder_hidden_states": values.normal(tokens, values.config.caption_channels),
        "encoder_attention_mask": mask,
        "timestep": values.timestep(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(denoiser: nn.Module, values: _Values) -> Call:
    tokens = _CLIP_TOKENS + _T5_TOKENS["SD3Transformer2DModel"]
    return (), {
        "hidden_states": values.latents(),
        "timestep": values.timestep(float(_TIMESTEP)),
        "encoder_hidden_states": values.normal(tokens, values.config.joint_attention_dim),
        "pooled_projections": values.normal(values.config.pooled_projection_dim),
        "joint_attention_kwargs": None,
    }


def _flux(denoiser: nn.Module, values: _Values) -> Call:
    tokens = _T5_TOKENS["FluxTransformer2DModel"]
    height, width = values.size[0] // 2, values.size[1] // 2
    places = torch.zeros(height, width, 3, dtype=values.dtype, device=values.device)
    places[..., 1] = torch.arange(height, device=values.device)[:, None]
    places[..., 2] = torch.arange(width, device=values.device)[None, :]
    guidance = values.timestep(3.5) if values.config.guidance_embeds else None
    return (), {
        "hidden_states": values.normal(height * width, values.config.in_channels),
        "timestep": values.timestep(_TIMESTEP / 1000).to(values.dtype),
        "guidance": guidance,
        "pooled_projections": values.normal(values.config.pooled_projection_dim),
        "encoder_hidden_states": values.normal(tokens, values.config.joint_attention_dim),
        "txt_ids": torch.zeros(tokens, 3, dtype=values.dtype, device=values.device),
        "img_ids": places.reshape(-1, 3),
        "joint_attention_kwargs": {},
    }


_BUILDERS: dict[str, Callable[[nn.Module, _Values], Call]] = {
    "UNet2DModel": _unet,
    "ClassConditionalUNet": _labelled_unet,
    "UNet2DConditionModel": _conditional_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
