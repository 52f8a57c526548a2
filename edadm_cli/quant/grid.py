r"""Uniform affine grids: integer codes, a scale and a zero-point.

    q     = clamp(rne(x * (1 / scale)) + zero_point, quant_min, quant_max)
    x_hat = (q - zero_point) * scale

`rne` rounds to nearest, ties to even; the reciprocal is taken in float32. Every engine computes exactly this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edadm_cli.quant.fusion import flat, fused


@dataclass(frozen=True)
class Grid:
    """The integer codes that a tensor may have.

    Weights have signed codes and the zero-point 0; activations have unsigned codes and any zero-point.

    Attributes:
        num_bits: The bits of a code.
        signed: Whether the codes range from -2^(num_bits - 1), and not from 0.
    """

    num_bits: int
    signed: bool

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return -(1 << (self.num_bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return (1 << (self.num_bits - 1)) - 1 if self.signed else (1 << self.num_bits) - 1


def weight_grid(num_bits: int) -> Grid:
    """Returns the grid of signed codes, such as -8..7 for four bits."""
    return Grid(num_bits, signed=True)


def activation_grid(num_bits: int) -> Grid:
    """Returns the grid of unsigned codes, such as 0..255 for eight bits."""
    return Grid(num_bits, signed=False)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Returns the codes of `x` as integers in float32, in the shape of `x`.

    Args:
        x: A floating-point tensor of any shape.
        scale: float32, broadcast against `x`.
        zero_point: Whole numbers, broadcast against `x`.
        grid: The codes allowed.
    """
    codes = torch.round(x.float() * scale.reciprocal()) + zero_point
    return codes.clamp(grid.quant_min, grid.quant_max)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns the real values of codes, float32."""
    return (codes.float() - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Returns `dequantize(quantize(x))` for one scale and zero-point per tensor, in the dtype of `x`.

    It uses plain operations instead of torch's fused one, which gives the same values and is much slower on a CPU.

    Args:
        x: A floating-point tensor of any shape.
        scale: float32, one element.
        zero_point: int32, one element.
        grid: The codes allowed.
    """
    scale = scale.reshape(())
    codes = (x.float() * scale.reciprocal()).round_()
    return codes.clamp_(*_bounds(x, zero_point, grid)).mul_(scale).to(x.dtype)


def _bounds(x: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Any, Any]:
    """Returns the bounds of codes that lack their zero-point, as numbers or as tensors.

    On a CPU they are numbers, since there a clamp between tensors takes several times as long. Elsewhere, to read the
    zero-point would wait for the device, and in a compiled graph it would break the graph.
    """
    shift = zero_point.reshape(())
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        number = float(shift)
        return grid.quant_min - number, grid.quant_max - number
    return grid.quant_min - shift, grid.quant_max - shift


def _forward(x: Tensor, reciprocal: Tensor, scale: Tensor, low: Tensor, high: Tensor, dropped: Tensor | None) -> Any:
    """Returns `x` on the grid except for dropped elements, and a mask of the elements that the grid clips."""
    rounded = (x * reciprocal).round_()
    codes = torch.clamp(rounded, low, high)
    clipped = codes != rounded
    quantized = codes.mul_(scale)
    return (quantized if dropped is None else torch.where(dropped, x, quantized)), clipped


def _backward(grad: Tensor, x: Tensor, output: Tensor, clipped: Tensor, dropped: Tensor | None) -> Any:
    """Returns the gradient to `x`, and what adds up to `scale` times the gradient to `scale`."""
    # Inside the range the slope is code - x / scale; clipped, it is the code. Dropped elements do not see the scale.
    slope = torch.where(clipped, output, output - x)
    if dropped is None:
        return grad.masked_fill(clipped, 0), slope.mul_(grad)
    return grad.masked_fill(clipped & ~dropped, 0), slope.mul_(grad.masked_fill(dropped, 0))


class _LearnedFakeQuantize(torch.autograd.Function):
    """Fake-quantize with a straight-through gradient to `x` and the LSQ gradient to `scale`, for a GPU."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, grid, dropped):  # type: ignore[no-untyped-def]
        ctx.scale_shape, scale, zero_point = scale.shape, scale.reshape(()), zero_point.reshape(())
        low, high = grid.quant_min - zero_point, grid.quant_max - zero_point
        x, dropped = x.contiguous(), None if dropped is None else flat(dropped)
        output, clipped = fused(_forward, x)(flat(x), scale.reciprocal(), scale, low, high, dropped)
        output = output.view_as(x)
        ctx.save_for_backward(x, scale, output, clipped, dropped)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, output, clipped, dropped = ctx.saved_tensors
        grad_x, products = fused(_backward, x)(flat(grad), flat(x), flat(output), clipped, dropped)
        return grad_x.view_as(x), (products.sum() / scale).reshape(ctx.scale_shape), None, None, None


class _LearnedFakeQuantizeOnCpu(torch.autograd.Function):
    """The same values and gradients, bit for bit, without masks: a CPU takes several times as long for booleans.

    The rounded codes before they are clipped take the place of the mask: `hardtanh_backward(t, codes, low, high)` is
    `t` where low < codes < high, and zero elsewhere.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, grid, dropped):  # type: ignore[no-untyped-def]
        ctx.scale_shape, scale, x = scale.shape, scale.reshape(()), x.contiguous()
        low, high = _bounds(x, zero_point, grid)
        rounded = (x * scale.reciprocal()).round_()
        output = rounded.clamp(low, high).mul_(scale)
        if dropped is not None:
            output = torch.where(dropped, x, output)
            rounded.masked_fill_(dropped, 0)  # zero is on every grid: not clipped, and below output - x is zero
        ctx.inside = low - 0.5, high + 0.5
        ctx.save_for_backward(x, scale, output, rounded)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, output, rounded = ctx.saved_tensors
        grad_scale, grad = None, grad.contiguous()
        if ctx.needs_input_grad[1]:
            passed = torch.ops.aten.hardtanh_backward(x, rounded, *ctx.inside)
            slope = torch.sub(output, passed, out=passed)
            grad_scale = (slope.mul_(grad).view(-1).sum() / scale).reshape(ctx.scale_shape)
        grad_x = torch.ops.aten.hardtanh_backward(grad, rounded, *ctx.inside) if ctx.needs_input_grad[0] else None
        return grad_x, grad_scale, None, None, None


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, dropped: Tensor | None = None
) -> Tensor:
    """Returns `fake_quantize(x)`, with a gradient for the scale.

    Args:
        x: A float32 tensor of any shape.
        scale: float32, shape `()`; it receives the LSQ gradient.
        zero_point: int32, shape `()`.
        grid: The codes allowed.
        dropped: Elements to leave unquantized, shape of `x`, bool (QDrop's activation drop).

    References:
        LSQ, arXiv 1902.08153, equation 3; QDrop, arXiv 2203.05740.
    """
    function = _LearnedFakeQuantize if x.is_cuda else _LearnedFakeQuantizeOnCpu
    result: Tensor = function.apply(x, scale, zero_point, grid, dropped)
    return result
