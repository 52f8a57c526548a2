"""Normalizations that return the inputs of the layers after them, as codes for integer layers, in one kernel each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.products.layout import channels_last
from edadm_cli.engines.cuda.products.product import IntegerLinear, Product
from edadm_cli.engines.cuda.products.quantizer import Quantizer

MAX_QUANTIZERS = 3


class Normalization(nn.Module):
    """Computes a GroupNorm (with or without SiLU) or LayerNorm, and the inputs of the layers that read it.

    Layers with equal quantizers share one output. The kernels support at most three quantizers of one width. Otherwise
    the normalization runs in floating point, and every layer prepares its own input.

    Args:
        norm: An `nn.GroupNorm` or `nn.LayerNorm`.
        consumers: The layers that read the normalization.
        silu: Whether SiLU follows the normalization.
        dtype: The element type of floating-point inputs.
        device: The device that it runs on.
        shortcut: A layer that reads the input of a GroupNorm as it is, or `None`.

    Attributes:
        writes_raw: Whether the codes of the input for the shortcut are returned too.
    """

    def __init__(
        self,
        norm: nn.Module,
        consumers: list[Product],
        silu: bool,
        dtype: torch.dtype,
        device: torch.device,
        shortcut: Product | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(norm, nn.GroupNorm | nn.LayerNorm)
        self.num_groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        self.eps, self.silu, self.dtype = norm.eps, silu, dtype
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[-1]
        self.weight, self.bias = affine(norm, channels, device)
        self.consumers = tuple(consumers)
        quantizers = {c.quantizer.key: c.quantizer for c in consumers if c.quantizer is not None}
        self.is_fused = bool(quantizers) and len(quantizers) <= MAX_QUANTIZERS and _one_width(quantizers.values())
        self.needs_float = not self.is_fused or any(c.quantizer is None for c in consumers)
        # torch's layer norm needs them in this element type; they are converted here and not in every step
        self.float_affine = (self.weight.to(dtype), self.bias.to(dtype))
        self.writes_raw = False
        if self.is_fused:
            self.places = {key: index for index, key in enumerate(quantizers)}
            writes = list(quantizers.values())
            self.num_bits = writes[0].num_bits
            can_write_more = self.num_groups is not None and len(writes) < MAX_QUANTIZERS
            if can_write_more and isinstance(shortcut, IntegerLinear) and shortcut.quantizer.num_bits == self.num_bits:
                self.writes_raw = True
                writes.append(shortcut.quantizer)
            self.scales = torch.cat([q.scale for q in writes])
            self.zero_points = torch.cat([q.zero_point for q in writes])

    def forward(self, x: Tensor, more: Tensor | None = None) -> list[Tensor]:
        """Returns the input of each consumer's `product`, and then the codes of `x` if `writes_raw`.

        Args:
            x: The tensor that is normalized, `[N, C, H, W]` (GroupNorm) or `[..., C]` (LayerNorm).
            more: Channels that follow those of the image `x`, as if both were concatenated.
        """
        x = channels_last(x) if self.num_groups is not None else x.contiguous()
        more = None if more is None else channels_last(more)
        codes = self._codes(x, more) if self.is_fused else []
        real = self._float(x if more is None else channels_last(torch.cat([x, more], dim=1))) if self.needs_float else x
        inputs = []
        for consumer in self.consumers:
            if self.is_fused and consumer.quantizer is not None:
                inputs.append(codes[self.places[consumer.quantizer.key]])
            else:
                inputs.append(consumer.prepare(real))
        return [*inputs, codes[-1]] if self.writes_raw else inputs

    def _codes(self, x: Tensor, more: Tensor | None) -> list[Tensor]:
        ends = (self.scales, self.zero_points, self.num_bits)
        if self.num_groups is None:
            return kernels.layer_norm_quantize(x, self.weight, self.bias, self.eps, *ends)
        affine = (self.weight, self.bias, self.num_groups, self.eps)
        return kernels.group_norm_quantize(x, *affine, self.silu, *ends, more, self.writes_raw)

    def _float(self, x: Tensor) -> Tensor:
        if self.num_groups is None:
            return F.layer_norm(x.to(self.dtype), self.weight.shape, *self.float_affine, self.eps)
        return kernels.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu).to(self.dtype)


def affine(norm: nn.Module, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias `[C]` of a normalization in float32 on a device, or ones and zeros if it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    vectors = (ones if weight is None else weight.detach(), zeros if bias is None else bias.detach())
    return vectors[0].to(device, torch.float32), vectors[1].to(device, torch.float32)


def _one_width(quantizers: object) -> bool:
    return len({q.num_bits for q in quantizers if isinstance(q, Quantizer)}) == 1  # type: ignore[attr-defined]
