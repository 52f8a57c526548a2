"""Residual blocks and resamplers of a UNet: convolutions between fused normalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.engines.cuda.layout import channels_last
from edadm_cli.engines.cuda.lowering import Lowering
from edadm_cli.engines.cuda.products import IntegerConv2d, Product, SplitProduct

TimeBias = Callable[[Tensor], Tensor]


class FusedResidualBlock(nn.Module):
    """A diffusers `ResnetBlock2D`: time embedding and shortcut are added in the convolutions' epilogues.

    Args:
        block: The original, for its norms.
        convolutions: `conv1` and `conv2`.
        shortcut: Or `None`.
        time_bias: From the time embedding to what is added per sample and channel, `[N, C]`; `None` without one.
        lowering: Makes the normalizations.
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
        self.norm1 = lowering.norm(block.norm1, [self.conv1], silu=True)
        self.norm2 = lowering.norm(block.norm2, [self.conv2], silu=True)
        self.output_scale = float(block.output_scale_factor)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *unused: Any, **ignored: Any) -> Tensor:
        """`[N, C, H, W]` to `[N, C_out, H, W]`, channels last."""
        return self._run((channels_last(input_tensor),), temb)

    def join(self, hidden_states: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
        """Returns the same of both inputs' channels, the hidden state's first, with no copy of both."""
        return self._run((channels_last(hidden_states), channels_last(skip)), temb)

    def _run(self, images: tuple[Tensor, ...], temb: Tensor | None) -> Tensor:
        sample_bias = None if self.time_bias is None or temb is None else self.time_bias(temb)
        (prepared,) = self.norm1(*images)
        hidden = self.conv1.product(prepared, None, sample_bias)
        (prepared,) = self.norm2(hidden)
        out = self.conv2.product(prepared, self._shortcut(images))
        return out if self.output_scale == 1 else out / self.output_scale

    def _shortcut(self, images: tuple[Tensor, ...]) -> Tensor:
        apart = tuple(image.shape[1] for image in images)
        if isinstance(self.shortcut, SplitProduct) and self.shortcut.sizes == apart:
            return self.shortcut.join(images)
        x = images[0] if len(images) == 1 else channels_last(torch.cat(images, dim=1))
        return x if self.shortcut is None else self.shortcut(x)


class FusedUpBlock(nn.Module):
    """A diffusers up block whose residual blocks read the hidden state and a skip connection where they lie.

    Args:
        block: The original, its residual blocks exchanged already; see `joins`.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = block.resnets
        attentions, upsamplers = getattr(block, "attentions", None), block.upsamplers
        self.attentions = attentions if attentions is not None else [None] * len(self.resnets)
        self.upsamplers = upsamplers if upsamplers is not None else []
        self.has_cross_attention = getattr(block, "has_cross_attention", False)  # which the model asks for

    @staticmethod
    def joins(block: Any) -> bool:
        """Returns whether a block does nothing but concatenate, and its residual blocks can read both parts."""
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
        """`[N, C, H, W]` and as many skip connections as residual blocks, the last first."""
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
    """A diffusers `Downsample2D` with a convolution, whose padding of one side is the convolution's own."""

    def __init__(self, convolution: Product, pads_one_side: bool) -> None:
        super().__init__()
        self.convolution = convolution
        self.pads_here = pads_one_side and not isinstance(convolution, IntegerConv2d)

    def forward(self, hidden_states: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        """`[N, C, H, W]` to half of height and width."""
        if self.pads_here:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.convolution(channels_last(hidden_states))


class FusedUpsample(nn.Module):
    """A diffusers `Upsample2D` with a convolution that reads the small image twice in each direction."""

    def __init__(self, convolution: IntegerConv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(
        self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *unused: Any, **ignored: Any
    ) -> Tensor:
        """`[N, C, H, W]` to twice height and width, or to `output_size`."""
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self.convolution(channels_last(F.interpolate(hidden_states, size=output_size, mode="nearest")))
        return self.convolution.product(self.convolution.prepare(hidden_states), upsample=True)


class FusedOutput(nn.Module):
    """The end of a UNet: normalization, SiLU and the last convolution."""

    def __init__(self, norm: nn.Module, convolution: Product, lowering: Lowering) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = lowering.norm(norm, [convolution], silu=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C_out, H, W]`."""
        (prepared,) = self.norm(hidden_states)
        return self.convolution.product(prepared)
