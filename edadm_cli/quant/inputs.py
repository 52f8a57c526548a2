r"""The quantizer of a layer's input: a transform, if there is one, then a grid with one scale and zero-point.

    codes = quantize(T x),   x_hat = dequantize(codes), which approximates T x and is multiplied by the weight W T^-1

A layer owns the tensors (`input_scale`, `input_zero_point`, those of the transform). This module defines what is
computed with them, and every engine uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edadm_cli.errors import MachineError
from edadm_cli.quant.grid import Grid, fake_quantize, learned_fake_quantize, quantize
from edadm_cli.quant.transforms import Transform


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """The quantizer of a layer's input.

    Attributes:
        grid: The codes allowed.
        scale: float32, one element.
        zero_point: int32, one element.
        channel_dim: The dimension of the input's channels, 1 or -1.
        transform: The transform of the input before it is quantized; `None` for none.
        tensors: The transform's tensors by name.
    """

    grid: Grid
    scale: Tensor
    zero_point: Tensor
    channel_dim: int
    transform: Transform | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> InputQuantizer:
        """Returns the same quantizer with its tensors, detached, on `device`."""
        tensors = {name: tensor.detach().to(device) for name, tensor in self.tensors.items()}
        scale, zero_point = (tensor.detach().to(device) for tensor in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero_point, tensors=tensors)

    def transformed(self, x: Tensor) -> Tensor:
        """Returns T x; `x` itself if there is no transform."""
        return x if self.transform is None else self.transform.apply(x, self.tensors, self.channel_dim)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes of `x` as integers in float32."""
        return quantize(self.transformed(x), self.scale, self.zero_point, self.grid)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Returns the real values of the codes of `x`, in the dtype of `x`."""
        return fake_quantize(self.transformed(x), self.scale, self.zero_point, self.grid).to(x.dtype)

    def learned(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        """Returns `fake_quantize(x)` with a gradient for `scale`; the elements `dropped` are not quantized."""
        return learned_fake_quantize(self.transformed(x), self.scale, self.zero_point, self.grid, dropped)

    def channel_factors(self) -> Tensor | None:
        """Returns the factors of a transform that only scales channels, with shape `(C_in,)`; `None` for no transform.

        Raises:
            MachineError: The transform is not a factor per channel, and the engine supports no other transform.
        """
        if self.transform is None:
            return None
        factors = self.transform.channel_factors(self.tensors)
        if factors is None:
            raise MachineError(
                f"The transform '{self.transform.name}' is not a factor per channel, and this engine supports no"
                " other transform.",
                hint="--engine reference, or a recipe without this transform",
            )
        return factors

    @property
    def factors_refusal(self) -> str | None:
        """The reason why an engine that only scales channels cannot run this; `None` if it can."""
        if self.transform is None or self.transform.channel_factors(self.tensors) is not None:
            return None
        return f"the transform '{self.transform.name}' of its input is more than a factor per channel"
