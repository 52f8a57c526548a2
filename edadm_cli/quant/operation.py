"""The operation of a quantizable layer: a linear map or a two-dimensional convolution, without its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EXACT_IN_FLOAT32 = 2**24  # every whole number up to this one is a float32 number


@dataclass(frozen=True)
class Operation:
    """A linear map or a convolution without its weight; its operands are real numbers, or integers in float tensors.

    Attributes:
        kind: Whether it is a linear map, for which the other fields keep their defaults, or a convolution.
        stride: The convolution's step in height and width, in pixels.
        padding: The zeros at each side of height and width.
        dilation: The distance of the kernel's taps in height and width.
        groups: The number of groups of channels that are convolved separately.
    """

    kind: Literal["linear", "conv2d"]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> Operation:
        """Returns the operation of an `nn.Linear` or `nn.Conv2d`.

        Raises:
            TypeError: The layer is of another kind, or its padding is not numbers of zeros.
        """
        if isinstance(layer, nn.Linear):
            return cls("linear")
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            return cls("conv2d", _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation), layer.groups)
        raise TypeError(f"{type(layer).__name__} is not a linear layer or a zero-padded convolution")

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns the output for `x`, `[N, C, H, W]` or `[..., C]`.

        Args:
            x: The input.
            weight: The weight, `[C_out, C / groups, kh, kw]` or `[C_out, C]`.
            bias: The bias, `[C_out]`; `None` for none.
        """
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def exact(self, codes: Tensor, weight: Tensor, largest: int) -> Tensor:
        """Returns the operation on whole numbers, without any rounding.

        Whole numbers and their sums are exact in float64 below 2^53. On a CPU float32 is used where no sum can exceed
        2^24, since it takes a fraction of the time; a GPU may round the factors of float32 products to TF32. NNPACK,
        which computes convolutions where oneDNN is missing, transforms the image first and rounds, so it is not used.

        Args:
            codes: The input as whole numbers, `[N, C, H, W]` or `[..., C]`.
            weight: The weight as whole numbers, `[C_out, C / groups, kh, kw]` or `[C_out, C]`.
            largest: A bound of the magnitude of every product of an input with a weight.
        """
        fits = codes.device.type == "cpu" and largest * weight[0].numel() <= _EXACT_IN_FLOAT32
        if not fits:
            return self(codes.double(), weight.double())
        with torch.backends.nnpack.flags(enabled=False):
            return self(codes.float(), weight.float())

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels of input and output."""
        return 1 if self.kind == "conv2d" else -1

    def is_pointwise(self, weight_shape: tuple[int, ...]) -> bool:
        """Returns whether this convolution is a matrix product: kernel 1x1, stride 1, no padding, one group."""
        alone = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return self.kind == "conv2d" and weight_shape[2:] == (1, 1) and alone

    def per_channel(self, values: Tensor) -> Tensor:
        """Returns values `[C_out]` shaped so that they broadcast against an output."""
        return values.reshape(-1, 1, 1) if self.kind == "conv2d" else values


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape of the weight of an `nn.Linear` or `nn.Conv2d`, also where the weight is not in memory."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, nn.Conv2d)
    return layer.out_channels, layer.in_channels // layer.groups, *_pair(layer.kernel_size)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
