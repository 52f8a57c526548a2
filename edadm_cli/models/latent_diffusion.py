"""Denoisers of CompVis latent-diffusion checkpoints that no class of diffusers describes.

They are components of stock pipelines (`LDMPipeline`, `DiTPipeline`), saved with this module's name in the pipeline's
index, so that `DiffusionPipeline.from_pretrained` finds them.

References:
    Latent Diffusion, arXiv 2112.10752.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

__all__ = ["ClassConditionalUNet", "FixedHeadsUNet", "ModelMixin"]
# ModelMixin is among them because diffusers recognises a component by the base classes in its module.


NUM_LABELS = 1001
"""Classes of ImageNet and "no class", the labels of `DiTPipeline`."""


def _with_num_labels(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of a constructor with `num_labels`: diffusers reads the configuration's keys from it."""
    signature = inspect.signature(function)
    extra = inspect.Parameter("num_labels", inspect.Parameter.KEYWORD_ONLY, default=NUM_LABELS)
    return signature.replace(parameters=[*signature.parameters.values(), extra])


class FixedHeadsUNet(UNet2DModel):
    """An unconditional UNet with the same number of attention heads at every level.

    `UNet2DModel` keeps the size of a head and lets their number grow with the channels. Here `attention_head_dim` is
    the size at the first level, and each level has `block_out_channels[0] / attention_head_dim` heads.
    """

    @functools.wraps(UNet2DModel.__init__)  # type: ignore[misc]  # diffusers reads the configuration's keys from the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_heads = self.config.block_out_channels[0] // self.config.attention_head_dim
        for module in self.modules():
            if type(module).__name__ == "Attention":
                module.heads = module.sliceable_head_dim = num_heads
                module.scale = (module.inner_dim // num_heads) ** -0.5


class ClassConditionalUNet(UNet2DConditionModel):
    """A UNet whose cross-attention sees the embedding of a class, called like a class-conditional transformer.

    The last of its embeddings is that of "no class". `DiTPipeline` asks for it by the label 1000, whatever the number
    of classes: a model with fewer classes takes every label beyond them for it, and a model with more classes swaps
    label 1000 with its last one.
    """

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, num_labels: int = NUM_LABELS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if num_labels != NUM_LABELS:  # so that the configurations of 1000 classes stay as they are
            self.register_to_config(num_labels=num_labels)
        self.num_classes = num_labels - 1
        self.label_embedding = nn.Embedding(num_labels, self.config.cross_attention_dim)

    __init__.__signature__ = _with_num_labels(UNet2DConditionModel.__init__)  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, timestep: Any, class_labels: Tensor, return_dict: bool = True) -> Any:
        """Predicts the noise.

        Args:
            hidden_states: Noisy latents, with shape `(N, C, H, W)`.
            timestep: One value, or one per row.
            class_labels: Classes from 0, or 1000 for none, with shape `(N,)`.
            return_dict: Whether to return an output with a field `sample`, or a tuple.
        """
        context = self.label_embedding(self._rows(class_labels))[:, None]  # [N, 1, D]
        return super().forward(hidden_states, timestep, encoder_hidden_states=context, return_dict=return_dict)

    def _rows(self, labels: Tensor) -> Tensor:
        """Returns the rows of the embedding for labels of `DiTPipeline`."""
        last, none = self.num_classes, NUM_LABELS - 1
        if last == none:
            return labels
        if last < none:
            return labels.clamp(max=last)
        return torch.where(labels == none, last, torch.where(labels == last, none, labels))
