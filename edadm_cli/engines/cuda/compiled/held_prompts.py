"""Computes keys and values of the prompt once per image, in transformers whose keys depend on the prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from edadm_cli.engines.cuda.state import Pair, PromptCache

_MODELS = ("PixArtTransformer2DModel",)


class HeldLayer(nn.Module):
    """Takes the place of a layer that reads the prompt. The layer's output is computed before the step and held.

    Args:
        layer: The layer.

    Attributes:
        held: The output, which is set at the beginning of a step.
    """

    held: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Returns the held output, whatever `x` is."""
        return self.held


class UnreadProjection(nn.Module):
    """Takes the place of the projection of the prompt, whose output only held layers would read: it computes nothing.

    Args:
        layer: The projection.
        width: The number of its output features.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.width = layer, width

    def forward(self, x: Tensor) -> Tensor:
        """Returns a view of `x` with the shape of the projection's output."""
        return x[..., :1].expand(*x.shape[:-1], self.width)


def hold_prompts(model: Any, prompt: PromptCache) -> None:
    """Makes a deployed PixArt take the keys and values of cross-attention from `prompt`, in place.

    Other models are not changed, because their keys and values depend on more than the prompt.

    Args:
        model: The denoiser.
        prompt: It computes keys and values when it is given another prompt, or one that has been overwritten.
    """
    if type(model).__name__ not in _MODELS or model.caption_projection is None:
        return
    held: list[tuple[HeldLayer, HeldLayer]] = []
    caption = model.caption_projection
    model.caption_projection = UnreadProjection(caption, model.inner_dim)
    for block in model.transformer_blocks:
        attention = block.attn2
        attention.to_k, attention.to_v = pair = HeldLayer(attention.to_k), HeldLayer(attention.to_v)
        place = prompt.add(partial(_project, caption, pair[0].layer, pair[1].layer))
        assert place == len(held)
        held.append(pair)
    prompt.is_active = True

    def begin(*_: Any) -> None:
        for place, (keys, values) in enumerate(held):
            keys.held, values.held = prompt.pair(place)

    model.register_forward_pre_hook(begin)


def _project(
    caption: Callable[[Tensor], Tensor], keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor], x: Tensor
) -> Pair:
    states = caption(x)
    return keys(states), values(states)
