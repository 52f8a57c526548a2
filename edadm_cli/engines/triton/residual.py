"""Residual blocks and resamplers of a UNet: convolutions between fused normalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.engines.triton.layout import channels_last
from edadm_cli.engines.triton.lowering import Lowering
from edadm_cli.engines.triton.products import IntegerConv2d, Product

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
        x = channels_last(input_tensor)
        sample_bias = None if self.time_bias is None or temb is None else self.time_bias(temb)
        (prepared,) = self.norm1(x)
        hidden = self.conv1.product(prepared, None, sample_bias)
        (prepared,) = self.norm2(hidden)
        out = self.conv2.product(prepared, x if self.shortcut is None else self.shortcut(x))
        return out if self.output_scale == 1 else out / self.output_scale


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
