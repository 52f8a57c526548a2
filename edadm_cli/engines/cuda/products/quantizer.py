"""The quantizer of a layer's input, in the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import edadm_kernels as kernels
from edadm_cli.quant.layers import QuantizedLayer


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Quantizes a layer's input with a scale, a zero-point and a number of bits.

    Attributes:
        scale: The scale, float32, with one element, on the device.
        zero_point: The zero-point of unsigned codes, int32, with one element.
        num_bits: The number of bits of a code.
        key: A value that is equal for quantizers that return equal codes.
    """

    scale: Tensor
    zero_point: Tensor
    num_bits: int
    key: tuple[float, int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the codes of `x`, int8, in the shape of `x`."""
        return kernels.quantize(x, self.scale, self.zero_point, self.num_bits)

    def joined(self, x: Tensor, more: Tensor) -> Tensor:
        """Returns the codes of two images `[N, C, H, W]`, channels last, whose channels lie side by side."""
        return kernels.quantize_joined(x, more, self.scale, self.zero_point, self.num_bits)

    @classmethod
    def of(cls, layer: QuantizedLayer, device: torch.device) -> Quantizer:
        """Returns the quantizer of a layer whose input is quantized."""
        bits = layer.plan.activation_bits
        assert bits is not None
        key = (float(layer.input_scale), int(layer.input_zero_point), bits)
        return cls(
            layer.input_scale.detach().reshape(1).to(device, torch.float32),
            layer.input_zero_point.detach().reshape(1).to(device, torch.int32),
            bits,
            key,
        )
