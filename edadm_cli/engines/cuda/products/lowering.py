"""Turns layers into products and joins them with normalizations; notes which do not run in integers, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import edadm_kernels as kernels
from edadm_cli.engines.adapters import SideBranch
from edadm_cli.engines.cuda.products.adapted import AdaptedProduct
from edadm_cli.engines.cuda.products.norms import Normalization
from edadm_cli.engines.cuda.products.product import FloatProduct, IntegerConv2d, IntegerLinear, Product, SplitProduct
from edadm_cli.engines.cuda.products.quantizer import Quantizer
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import part_name
from edadm_cli.quant.split_layer import SplitLayer

Padding = tuple[int, int, int, int]
FLOAT_INPUT = "its input stays in floating point"
"""The refusal of a layer whose recipe quantizes the weight alone."""


def refusal(layer: QuantizedLayer) -> str | None:
    """Returns a clause that says why the fused blocks cannot run a layer; `None` if they can."""
    if layer.transform is not None:
        return f"the fused blocks do not have the transform '{layer.transform.name}' of its input"
    return product_refusal(layer)


def product_refusal(layer: QuantizedLayer) -> str | None:
    """Returns a clause that says why the kernels cannot multiply the codes of a layer; `None` if they can."""
    operation = layer.operation
    if layer.plan.input_grid is None:
        return FLOAT_INPUT
    terms = torch.Size(layer.weight_shape[1:]).numel()
    if terms > kernels.MAX_TERMS:
        return f"a sum of {terms} products may not fit an int32"
    if operation.kind == "linear":
        return None
    if max(layer.weight_shape[2:]) > kernels.MAX_KERNEL:
        return f"the kernels have no convolution of {layer.weight_shape[2]}x{layer.weight_shape[3]} taps"
    if operation.groups != 1:
        return f"the kernels have no convolution in {operation.groups} groups"
    if operation.dilation != (1, 1):
        return f"the kernels have no convolution with dilation {operation.dilation}"
    if operation.stride[0] != operation.stride[1]:
        return f"the kernels have no convolution with strides {operation.stride}"
    return None


@dataclass
class Lowering:
    """Turns layers into products, joins them with the normalizations before them, and notes how each layer runs.

    Attributes:
        device: The device of the products.
        dtype: The element type of everything that is not integer.
        pack_weights: Whether weights of at most four bits stay packed, and are not unpacked once.
        left_in_float: The reason for each layer that runs in floating point although the kernels support it, by name.
            Its input is not quantized, as that of a layer that the recipe leaves in float.
        adapters: The side branch of each layer with LoRA adapters, by name.
        decisions: The precision of each planned layer, by name, with the reason if it does not run in integers.
    """

    device: torch.device
    dtype: torch.dtype
    pack_weights: bool = False
    left_in_float: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, SideBranch] = field(default_factory=dict)
    decisions: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def product(self, name: str, layer: nn.Module, padding: Padding | None = None) -> Product:
        """Returns the product of an `nn.Linear`, `nn.Conv2d`, `QuantizedLayer` or `SplitLayer`.

        Args:
            name: The dotted name of the layer in the denoiser.
            layer: The layer.
            padding: The padding at the top, bottom, left and right; `None` takes the convolution's own.
        """
        branch = self.adapters.get(name)
        if branch is not None:
            padding = None  # the block pads, for the branch reads the input too
        if isinstance(layer, SplitLayer):
            parts = [self.product(part_name(name, index), part) for index, part in enumerate(layer.parts)]
            product: Product = SplitProduct(parts, layer.sizes, layer.channel_dim)
        elif isinstance(layer, QuantizedLayer):
            product = self._quantized(name, layer, padding)
        else:
            product = self._float(layer)
        product.label = name
        if branch is None:
            return product
        return AdaptedProduct(product, branch.to(self.device, self.dtype))

    def norm(
        self, norm: nn.Module, consumers: list[Product], silu: bool, shortcut: Product | None = None
    ) -> Normalization:
        """Returns a normalization that prepares the inputs of `consumers`."""
        return Normalization(norm, consumers, silu, self.dtype, self.device, shortcut)

    def can_pack(self, layer: QuantizedLayer) -> bool:
        """Returns whether a layer's weights stay packed."""
        return self.pack_weights and layer.plan.product_bits <= 4

    def codes(self, layer: QuantizedLayer) -> Tensor:
        """Returns a layer's int8 weight codes on the device; on `meta` nothing is unpacked, as only shapes count."""
        if self.device.type == "meta":
            return torch.empty(layer.weight_shape, dtype=torch.int8, device=self.device)
        return layer.weight_int.detach().to(self.device)

    @property
    def float_name(self) -> str:
        """Returns the name of the floating-point element type."""
        return str(self.dtype).removeprefix("torch.")

    def _quantized(self, name: str, layer: QuantizedLayer, padding: Padding | None) -> Product:
        operation = layer.operation
        refused, chosen = refusal(layer), self.left_in_float.get(name)
        if refused is not None or chosen is not None:
            self.decisions[name] = (self.float_name, refused or chosen)
            weight = layer.weight_int.float() * layer.weight_scale.reshape(-1, *[1] * (len(layer.weight_shape) - 1))
            rounded_to = layer if refused is not None else None
            return FloatProduct(operation, weight.to(self.device), self._bias(layer), self.dtype, rounded_to)
        self.decisions[name] = ("int8", None)
        return self._integer(layer, padding)

    def _integer(self, layer: QuantizedLayer, padding: Padding | None) -> Product:
        operation = layer.operation
        quantizer, scale = Quantizer.of(layer, self.device), layer.weight_scale.detach().to(self.device)
        codes, bias, packs = self.codes(layer), self._bias(layer), self.can_pack(layer)
        if operation.kind == "linear" or operation.is_pointwise(layer.weight_shape):
            is_convolution = operation.kind == "conv2d"
            return IntegerLinear(codes.flatten(1), scale, bias, quantizer, self.dtype, is_convolution, packs)
        down, right = operation.padding
        around = padding or (down, down, right, right)
        return IntegerConv2d(codes, scale, bias, quantizer, self.dtype, operation.stride[0], around, packs)

    def _float(self, layer: nn.Module) -> FloatProduct:
        operation = Operation.of(layer)
        assert isinstance(layer.weight, Tensor)
        bias = layer.bias.detach().to(self.device) if isinstance(layer.bias, Tensor) else None
        return FloatProduct(operation, layer.weight.detach().to(self.device), bias, self.dtype)

    def _bias(self, layer: QuantizedLayer) -> Tensor | None:
        return None if layer.bias is None else layer.bias.detach().to(self.device)
