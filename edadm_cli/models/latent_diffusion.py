"""Denoisers of the CompVis latent-diffusion checkpoints that no class of diffusers' own describes.

They are components of stock pipelines (`LDMPipeline`, `DiTPipeline`), saved with this module's name in the pipeline's
index, so that `DiffusionPipeline.from_pretrained` finds them.

References:
    Latent Diffusion, arXiv 2112.10752.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

__all__ = ["ClassConditionalUNet", "FixedHeadsUNet", "ModelMixin"]
# ModelMixin is among them because diffusers recognises a component by the base classes in its module.


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

    Of its 1001 embeddings the last one is that of "no class", as `DiTPipeline` takes it.
    """

    num_classes = 1000

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_embedding = nn.Embedding(self.num_classes + 1, self.config.cross_attention_dim)

    def forward(self, hidden_states: Tensor, timestep: Any, class_labels: Tensor, return_dict: bool = True) -> Any:
        """Predict the noise.

        Args:
            hidden_states: Noisy latents, with shape `(N, C, H, W)`.
            timestep: One value, or one a row.
            class_labels: Classes from 0 to 999, or 1000 for none, with shape `(N,)`.
            return_dict: Whether to return an output with a field `sample`, or a tuple.
        """
        context = self.label_embedding(class_labels)[:, None]  # [N, 1, D]
        return super().forward(hidden_states, timestep, encoder_hidden_states=context, return_dict=return_dict)
