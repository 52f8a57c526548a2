r"""Splits each layer into two halves: the preparation (quantization) of its input, and the product with its epilogue.

A block that knows the layer before or after a product calls the halves separately: a normalization can return codes,
and the epilogue can add the hidden state. A layer that is called as a module runs both halves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.products.layout import channels_last, image_of, quantizable, rows_of
from edadm_cli.engines.cuda.products.quantizer import Quantizer
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation
from edadm_kernels import pack

AND = " + "
"""The separator between the names of layers that run as one."""


class Product(nn.Module, ABC):
    """A convolution or linear layer: `forward(x)` is `product(prepare(x))`.

    Inputs and outputs are `[..., C]` for a linear layer and `[N, C, H, W]`, channels last, for a convolution.
    """

    quantizer: Quantizer | None = None
    """The quantizer of the input of `product`; `None` where `product` expects floating point."""
    label: str = ""
    """The layer's name in the denoiser."""

    @abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """Returns the input of `product`: the codes of `x`, or `x` itself."""

    @abstractmethod
    def product(self, prepared: Tensor, residual: Tensor | None = None, sample_bias: Tensor | None = None) -> Tensor:
        """Multiplies, and adds the bias, `sample_bias` `[N, C_out]` (convolutions) and `residual` (output's shape)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Prepares `x` and multiplies it."""
        return self.product(self.prepare(x), residual)


class IntegerLinear(Product):
    """A linear layer, or a convolution with a 1x1 kernel, on int8 codes.

    Args:
        weight: The codes of the weight, int8 `[N, K]`.
        weight_scale: The scale per output feature, float32 `[N]`.
        bias: The bias `[N]`, or `None`.
        quantizer: The quantizer of the input.
        out_dtype: The type of the output.
        is_convolution: Whether inputs and outputs are images.
        pack_weight: Whether two codes of at most four bits are stored per byte where K allows it.
    """

    quantizer: Quantizer

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantizer: Quantizer,
        out_dtype: torch.dtype,
        is_convolution: bool = False,
        pack_weight: bool = False,
    ) -> None:
        super().__init__()
        self.quantizer, self.out_dtype, self.is_convolution = quantizer, out_dtype, is_convolution
        self.correction = pack.linear_correction(weight, quantizer.zero_point)
        self.weight = packed(weight, pack_weight)
        self.scale = (quantizer.scale * weight_scale.float()).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    @property
    def num_outputs(self) -> int:
        """Returns the number of output features."""
        return self.weight.shape[0]

    def prepare(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """Returns the codes of `x` in its shape, or those of an image `x` and of the channels `more` that follow."""
        return self.quantizer(quantizable(x)) if more is None else self.quantizer.joined(x, more)

    def product(
        self,
        prepared: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        reader: IntegerLinear | None = None,
    ) -> Tensor:
        """Runs one GEMM; see `Product`. The output is the codes of `reader` if only this layer reads the sum."""
        assert sample_bias is None
        if reader is not None:
            assert residual is not None
            return self._codes(prepared, residual, reader.quantizer)
        if not self.is_convolution:
            residual = None if residual is None else residual.reshape(-1, self.num_outputs)
            y = self.multiply(prepared.reshape(-1, prepared.shape[-1]), residual)
            return y.view(*prepared.shape[:-1], self.num_outputs)
        batch, _, height, width = prepared.shape
        y = self.multiply(rows_of(prepared), None if residual is None else rows_of(channels_last(residual)))
        return image_of(y, batch, height, width)

    def _codes(self, prepared: Tensor, residual: Tensor, quantizer: Quantizer) -> Tensor:
        """Returns the codes `[..., N]` of the product of rows `[..., K]` and `residual`."""
        operands = (self.weight, self.scale, self.correction, self.bias, residual.reshape(-1, self.num_outputs))
        ends = (quantizer.scale, quantizer.zero_point, quantizer.num_bits)
        y = kernels.linear_to_codes(prepared.reshape(-1, prepared.shape[-1]), *operands, *ends)
        return y.view(*prepared.shape[:-1], self.num_outputs)

    def multiply(self, codes: Tensor, residual: Tensor | None) -> Tensor:
        """Multiplies codes `[M, K]` and returns `[M, N]`."""
        return kernels.linear(
            codes, self.weight, self.scale, self.correction, self.bias, residual, out_dtype=self.out_dtype
        )


class IntegerConv2d(Product):
    """A convolution on int8 codes, whose addressing includes stride, padding and nearest 2x upsampling.

    Args:
        weight: The codes of the weight, int8 `[C_out, C_in, kh, kw]`.
        weight_scale: The scale per output channel, float32 `[C_out]`.
        bias: The bias `[C_out]`, or `None`.
        quantizer: The quantizer of the input.
        out_dtype: The element type of the output.
        stride: The stride in both directions.
        padding: The numbers of rows or columns of zeros at the top, bottom, left and right.
        pack_weight: Whether two codes of at most four bits are stored per byte where C_in allows it.
    """

    quantizer: Quantizer

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantizer: Quantizer,
        out_dtype: torch.dtype,
        stride: int,
        padding: tuple[int, int, int, int],
        pack_weight: bool = False,
    ) -> None:
        super().__init__()
        self.quantizer, self.out_dtype, self.stride, self.padding = quantizer, out_dtype, stride, padding
        rows = weight.permute(0, 2, 3, 1).contiguous()  # [O, kh, kw, C]
        self.correction = pack.conv_border_table(rows, quantizer.zero_point, padding)
        self.weight = packed(rows, pack_weight)
        self.scale = (quantizer.scale * weight_scale.float()).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def prepare(self, x: Tensor) -> Tensor:
        """Returns the codes of `x`, channels last."""
        return self.quantizer(quantizable(x))

    def product(
        self,
        prepared: Tensor,
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        upsample: bool = False,
    ) -> Tensor:
        """Multiplies; see `Product`. If `upsample`, the input's height and width are doubled by repetition first."""
        return kernels.conv2d(
            prepared,
            self.weight,
            self.scale,
            self.correction,
            self.bias,
            sample_bias,
            None if residual is None else channels_last(residual),
            stride=self.stride,
            padding=self.padding,
            upsample=upsample,
            out_dtype=self.out_dtype,
        )


class FloatProduct(Product):
    """A layer in floating point, with the interface of the integer ones.

    Args:
        operation: The operation of the layer.
        weight: The weight, in the layout of the layer.
        bias: The bias, or `None`.
        rounded_to: The layer's input quantizer when its input is still rounded to codes, though not multiplied as such.
        dtype: The element type of the arithmetic.
    """

    def __init__(
        self,
        operation: Operation,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rounded_to: QuantizedLayer | None = None,
    ) -> None:
        super().__init__()
        weight = weight.to(dtype)
        self.operation = operation
        self.is_pointwise = operation.is_pointwise(tuple(weight.shape))
        self.weight = channels_last(weight) if operation.kind == "conv2d" else weight.contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        quantizer = None if rounded_to is None else rounded_to.input_quantizer
        self.input_quantizer = None if quantizer is None else quantizer.to(weight.device)

    @property
    def num_outputs(self) -> int:
        """Returns the number of output features."""
        return self.weight.shape[0]

    def prepare(self, x: Tensor) -> Tensor:
        """Returns `x`, rounded to the values of its codes if the layer has an input quantizer."""
        x = x.to(self.weight.dtype)
        return x if self.input_quantizer is None else self.input_quantizer.fake_quantize(x)

    def product(self, prepared: Tensor, residual: Tensor | None = None, sample_bias: Tensor | None = None) -> Tensor:
        """See `Product`."""
        y = self._pointwise(prepared) if self.is_pointwise else self.operation(prepared, self.weight, self.bias)
        if sample_bias is not None:
            y = y + sample_bias[:, :, None, None]
        return y if residual is None else y + residual

    @property
    def joins(self) -> bool:
        """Returns whether `join` computes the layer."""
        return self.is_pointwise and self.operation.kind == "conv2d" and self.input_quantizer is None

    def join(self, x: Tensor, more: Tensor) -> Tensor:
        """Returns the layer's output for an image `x` and the channels `more` that follow, without a copy of both."""
        weight, channels = self.weight.flatten(1), x.shape[1]
        y = F.linear(rows_of(x.to(weight.dtype)), weight[:, :channels], self.bias)
        y = torch.addmm(y, rows_of(more.to(weight.dtype)), weight[:, channels:].T)
        return image_of(y, x.shape[0], *x.shape[2:])

    def _pointwise(self, x: Tensor) -> Tensor:
        """Returns a 1x1 convolution as a matrix product, which reads a range of an image's channels where they are."""
        rows = F.linear(rows_of(x), self.weight.flatten(1), self.bias)
        return image_of(rows, x.shape[0], *x.shape[2:])


class SplitProduct(Product):
    """A layer over a concatenated input: every channel range has a product of its own, summed in the epilogues."""

    def __init__(self, parts: list[Product], sizes: tuple[int, ...], channel_dim: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes, self.channel_dim = sizes, channel_dim

    def prepare(self, x: Tensor) -> Tensor:
        """Returns `x` itself, because each part quantizes its own range."""
        return channels_last(x) if x.ndim == 4 else x

    def product(self, prepared: Tensor, residual: Tensor | None = None, sample_bias: Tensor | None = None) -> Tensor:
        """See `Product`."""
        assert sample_bias is None
        return self.join(prepared.split(self.sizes, dim=self.channel_dim), residual)

    def join(self, pieces: Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        """Multiplies an input that is given as one tensor per part in place of a concatenated tensor."""
        for part, piece in zip(self.parts, pieces, strict=True):
            assert isinstance(part, Product)
            residual = part.product(part.prepare(piece), residual)
        assert residual is not None
        return residual


def packed(codes: Tensor, pack_weight: bool) -> Tensor:
    """Returns codes as the kernels store them: int8, or two per byte where `pack_weight` is set and K allows it."""
    if pack_weight and pack.w4_block(codes.shape[-1]) is not None:
        return pack.pack_w4(codes)
    return codes.contiguous()


def merge(layers: list[IntegerLinear]) -> IntegerLinear:
    """Merges layers that share an input and its quantizer into one product whose outputs are concatenated."""
    first = layers[0]
    merged = IntegerLinear.__new__(IntegerLinear)
    nn.Module.__init__(merged)
    merged.quantizer, merged.out_dtype, merged.is_convolution = first.quantizer, first.out_dtype, False
    merged.label = AND.join(layer.label for layer in layers)
    merged.weight = torch.cat(_stored_alike([layer.weight for layer in layers]))
    merged.scale = torch.cat([layer.scale for layer in layers])
    merged.correction = torch.cat([layer.correction for layer in layers])
    merged.bias = _joined([layer.bias for layer in layers], [layer.scale for layer in layers])
    return merged


def _stored_alike(weights: list[Tensor]) -> list[Tensor]:
    """Returns weights as they are if all or none are packed; otherwise all of them with one code per byte."""
    if len({weight.dtype for weight in weights}) == 1:
        return weights
    return [pack.unpack_w4(weight) if weight.dtype == torch.uint8 else weight for weight in weights]


def merge_floats(layers: list[FloatProduct]) -> FloatProduct:
    """Merges floating-point linear layers that share an unquantized input into one; its outputs are concatenated."""
    first = layers[0]
    bias = _joined([layer.bias for layer in layers], [layer.weight[:, 0] for layer in layers])
    merged = FloatProduct(first.operation, torch.cat([layer.weight for layer in layers]), bias, first.weight.dtype)
    merged.label = AND.join(layer.label for layer in layers)
    return merged


def _joined(biases: list[Tensor | None], like: list[Tensor]) -> Tensor | None:
    """Concatenates biases, with zeros shaped as `like` for a missing one; returns `None` if all are missing."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([torch.zeros_like(x) if bias is None else bias for bias, x in zip(biases, like, strict=True)])
