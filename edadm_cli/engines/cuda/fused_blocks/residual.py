"""Residual blocks and resamplers of a UNet: convolutions between fused normalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.engines.cuda.products.layout import channels_last
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.product import FloatProduct, IntegerConv2d, IntegerLinear, Product, SplitProduct

TimeBias = Callable[[Tensor], Tensor]


class FusedResidualBlock(nn.Module):
    """Computes a diffusers `ResnetBlock2D`, with time embedding and shortcut added in the convolutions' epilogues.

    Args:
        block: The original block, which supplies the norms.
        convolutions: The products of `conv1` and `conv2`.
        shortcut: The product of the shortcut, or `None`.
        time_bias: A function from the time embedding to the bias per sample and channel, `[N, C]`; `None` if there is
            no time embedding.
        lowering: It joins the normalizations with the layers that read them.
    """

    def __init__(
        self,
        block: Any,
        convolutions: tuple[Product, Product],
        shortcut: Product | None,
        time_bias: TimeBias | None,
        lowering: Lowering,
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = convolutions
        self.shortcut, self.time_bias = shortcut, time_bias
        self.norm1 = lowering.norm(block.norm1, [self.conv1], silu=True, shortcut=shortcut)
        self.norm2 = lowering.norm(block.norm2, [self.conv2], silu=True)
        self.output_scale = float(block.output_scale_factor)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *unused: Any, **ignored: Any) -> Tensor:
        """Returns `[N, C_out, H, W]`, channels last, for an input `[N, C, H, W]`."""
        return self._run((channels_last(input_tensor),), temb)

    def join(self, hidden_states: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
        """Returns the output for the concatenation of `hidden_states` and `skip`, without concatenating them."""
        return self._run((channels_last(hidden_states), channels_last(skip)), temb)

    def _run(self, images: tuple[Tensor, ...], temb: Tensor | None) -> Tensor:
        sample_bias = None if self.time_bias is None or temb is None else self.time_bias(temb)
        prepared, *codes = self.norm1(*images)
        hidden = self.conv1.product(prepared, None, sample_bias)
        (prepared,) = self.norm2(hidden)
        shortcut = self._shortcut(images) if self.shortcut is None or not codes else self.shortcut.product(codes[0])
        out = self.conv2.product(prepared, shortcut)
        return out if self.output_scale == 1 else out / self.output_scale

    def _shortcut(self, images: tuple[Tensor, ...]) -> Tensor:
        if len(images) == 1:
            return images[0] if self.shortcut is None else self.shortcut(images[0])
        if isinstance(self.shortcut, SplitProduct) and self.shortcut.sizes == tuple(x.shape[1] for x in images):
            return self.shortcut.join(images)
        if isinstance(self.shortcut, IntegerLinear):
            return self.shortcut.product(self.shortcut.prepare(*images))
        if isinstance(self.shortcut, FloatProduct) and self.shortcut.joins:
            return self.shortcut.join(*images)
        x = channels_last(torch.cat(images, dim=1))
        return x if self.shortcut is None else self.shortcut(x)


class FusedUpBlock(nn.Module):
    """Computes a diffusers up block without concatenating the hidden state and the skip connections.

    Args:
        block: The original block, whose residual blocks are replaced already; see `joins`.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = block.resnets
        attentions, upsamplers = getattr(block, "attentions", None), block.upsamplers
        self.attentions = attentions if attentions is not None else [None] * len(self.resnets)
        self.upsamplers = upsamplers if upsamplers is not None else []
        self.has_cross_attention = getattr(block, "has_cross_attention", False)  # the model reads this attribute

    @staticmethod
    def joins(block: Any) -> bool:
        """Returns whether a block only concatenates its inputs, and its residual blocks can read two tensors."""
        rescales = any(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))  # FreeU
        plain = getattr(block, "upsample_type", "conv") != "resnet"
        return plain and not rescales and all(isinstance(resnet, FusedResidualBlock) for resnet in block.resnets)

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the output for a hidden state `[N, C, H, W]` and skip connections, which are read last to first."""
        skips = reversed(res_hidden_states_tuple[-len(self.resnets) :])
        for resnet, attention, skip in zip(self.resnets, self.attentions, skips, strict=True):
            hidden_states = resnet.join(hidden_states, skip, temb)
            if attention is not None and self.has_cross_attention:
                hidden_states = attention(
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    cross_attention_kwargs=cross_attention_kwargs,
                    attention_mask=attention_mask,
                    encoder_attention_mask=encoder_attention_mask,
                    return_dict=False,
                )[0]
            elif attention is not None:
                hidden_states = attention(hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


class FusedDownsample(nn.Module):
    """Computes a diffusers `Downsample2D` with a convolution, which includes the padding of one side."""

    def __init__(self, convolution: Product, pads_one_side: bool) -> None:
        super().__init__()
        self.convolution = convolution
        self.pads_here = pads_one_side and not isinstance(convolution, IntegerConv2d)

    def forward(self, hidden_states: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        """Returns an image of half the height and width for an image `[N, C, H, W]`."""
        if self.pads_here:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.convolution(channels_last(hidden_states))


class FusedUpsample(nn.Module):
    """Computes a diffusers `Upsample2D` with a convolution that reads each pixel of the small image twice per axis."""

    def __init__(self, convolution: IntegerConv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(
        self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *unused: Any, **ignored: Any
    ) -> Tensor:
        """Returns an image of twice the height and width, or of `output_size`, for an image `[N, C, H, W]`."""
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self.convolution(channels_last(F.interpolate(hidden_states, size=output_size, mode="nearest")))
        return self.convolution.product(self.convolution.prepare(hidden_states), upsample=True)


class FusedOutput(nn.Module):
    """Computes the end of a UNet: normalization, SiLU and the last convolution."""

    def __init__(self, norm: nn.Module, convolution: Product, lowering: Lowering) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = lowering.norm(norm, [convolution], silu=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the prediction `[N, C_out, H, W]` for a hidden state `[N, C, H, W]`."""
        (prepared,) = self.norm(hidden_states)
        return self.convolution.product(prepared)
