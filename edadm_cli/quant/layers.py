r"""Deployed quantized layers: integer codes, scales, and two equivalent arithmetics.

fake-quantize:  y = op(dequantize(quantize(T x)), w_int * w_scale) + b
integer:        y = op(q - zero_point, w_int) * (x_scale * w_scale) + b,   the sum exact, the epilogue float32

T is the layer's transform, if it has one; its inverse is in the weight (see `edadm_cli/quant/transforms.py`). Where
weights have groups, w_int is a code times the multiplier of its group (see `edadm_cli/quant/groups.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from edadm_cli.quant.buffers import keeping_float32
from edadm_cli.quant.grid import dequantize, weight_grid
from edadm_cli.quant.groups import codes_of, num_groups, packed_multipliers, per_weight, unpacked_multipliers
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation, weight_shape
from edadm_cli.quant.packing import pack, unpack
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.quant.storage import is_packed, packed_bytes, stored_bits
from edadm_cli.quant.transforms import Transform, transform_named

Arithmetic = Literal["fake-quantize", "integer"]

_OFFLOADERS = {"_hf_hook", "_diffusers_hook"}
"""Attributes of a layer whose tensors accelerate or diffusers load for every forward and remove after it."""


class LayerProduct(Protocol):
    """Multiplies the codes of layers in integers; one object serves all layers of a network.

    A layer asks its product whenever its tensors have moved or changed (`prepare`) and in every forward (`runs`,
    then the call), so `runs` and the call are written such that `torch.compile` can trace them.
    """

    def prepare(self, layer: QuantizedLayer) -> None:
        """Computes further tensors that a call needs, if the layer is on a device that this product supports.

        These tensors are non-persistent buffers of the layer; buffers of an earlier call are replaced.
        """

    def join(self, model: nn.Module) -> None:
        """Finds layers of a model that may be multiplied together; called once all of them have this product."""

    def runs(self, layer: QuantizedLayer) -> bool:
        """Returns whether the layer is prepared on the device of its codes."""

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Reports once why a layer computes in floating point; called by eager forwards in floating point."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Returns the layer's output for `x`, in the element type of `x`."""


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with integer weights and a static input quantizer.

    Codes of at most four bits are packed. Scales are float32, whatever dtype the model is cast to.

    Args:
        operation: The linear map or convolution that the layer computes.
        plan: The bits of the layer; `channel_parts` must be unset (see `SplitLayer`).
        weight_shape: `[C_out, C_in / groups, kh, kw]` or `[C_out, C_in]`.
        bias: The float bias `[C_out]`, which is kept as it is.
        device: The device of the codes and scales.
        code_bits: The bits that a code takes in memory and on disk; by default as few as possible.

    Attributes:
        keeps_float_weight: Whether the dequantized weight stays in memory after the first forward. Without it a forward
            costs a little more time, and a whole denoiser four bytes per weight less. An offloaded layer does not keep
            it.
        product: Multiplies the codes on the devices that it supports, in place of quantize-dequantize; see `deploy`.
        member: Data of the product about layers that share their input; `None` if the layer is multiplied alone.
    """

    weight_codes: Tensor
    weight_multiplier: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(
        self,
        operation: Operation,
        plan: LayerPlan,
        weight_shape: tuple[int, ...],
        bias: Tensor | None = None,
        device: torch.device | None = None,
        code_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.code_bits = stored_bits(plan.weight_bits) if code_bits is None else code_bits
        self.operation, self.plan, self.weight_shape = operation, plan, tuple(weight_shape)
        self.arithmetic: Arithmetic = "fake-quantize"
        self.register_buffer("weight_codes", torch.zeros(self.codes_shape, dtype=self.codes_dtype, device=device))
        if plan.group_size is not None:
            ones = torch.ones(weight_shape[0], self.num_groups, dtype=torch.int8, device=device)
            self.register_buffer("weight_multiplier", packed_multipliers(ones))
        self.register_buffer("weight_scale", torch.ones(weight_shape[0], device=device))
        if plan.input_grid is not None:
            self.register_buffer("input_scale", torch.ones((), device=device))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        self.transform: Transform | None = None if plan.transform is None else transform_named(plan.transform)
        for name in self.transform_tensors:
            self.register_buffer(name, torch.ones(self.in_features, device=device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.keeps_float_weight = True
        self.product: LayerProduct | None = None
        self.member: Any = None
        self._weight: Tensor | None = None

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """The shape of `weight_codes` in memory and on disk."""
        if not is_packed(self.plan.weight_bits):
            return self.weight_shape
        per_row = torch.Size(self.weight_shape[1:]).numel()
        return (self.weight_shape[0], packed_bytes(per_row, self.code_bits))

    @property
    def num_groups(self) -> int:
        """The number of groups of an output channel's weights."""
        assert self.plan.group_size is not None
        return num_groups(torch.Size(self.weight_shape[1:]).numel(), self.plan.group_size)

    @property
    def in_features(self) -> int:
        """Input channels under the name of `nn.Linear`, which some pipelines read (Stable Diffusion XL)."""
        return self.weight_shape[1] * self.operation.groups

    @property
    def out_features(self) -> int:
        """The number of output channels, under the name of `nn.Linear`."""
        return self.weight_shape[0]

    in_channels, out_channels = in_features, out_features  # the names of `nn.Conv2d`

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the element type of the bias, for networks that read it (Z-Image)."""
        return self._float_weight().to(torch.float32 if self.bias is None else self.bias.dtype)

    @property
    def codes_dtype(self) -> torch.dtype:
        """The element type of `weight_codes`."""
        return torch.uint8 if is_packed(self.plan.weight_bits) else torch.int8

    def set_parameters(
        self,
        weight_int: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        weight_multiplier: Tensor | None = None,
        **transform_tensors: Tensor,
    ) -> None:
        """Sets the integers of the weight, the scales, the multipliers, the transform's tensors, and a corrected bias.

        Args:
            weight_int: int8, `weight_shape`; with groups, codes times multipliers.
            weight_scale: The scale of each output channel, `[C_out]`.
            input_scale: The scale of the input, one element.
            input_zero_point: The zero-point of the input, one element.
            bias: A corrected bias.
            weight_multiplier: The multiplier of each group, int8 `[C_out, num_groups]`, where there are groups.
            transform_tensors: The tensors of the transform by name.

        Raises:
            ValueError: A tensor that the plan needs is missing, or a bias is given to a layer without one.
            InputError: The multipliers do not divide the integers of their groups.
        """
        if self.plan.group_size is not None:
            if weight_multiplier is None:
                raise ValueError("a layer with groups needs their multipliers")
            self.weight_multiplier.copy_(packed_multipliers(weight_multiplier))
            weight_int = codes_of(weight_int, weight_multiplier, self.plan.group_size)
        has_packed_codes = is_packed(self.plan.weight_bits)
        self.weight_codes.copy_(pack(weight_int, self.code_bits) if has_packed_codes else weight_int.to(torch.int8))
        self.weight_scale.copy_(weight_scale)
        if self.plan.input_grid is not None:
            if input_scale is None or input_zero_point is None:
                raise ValueError("a layer with a quantized input needs its scale and zero-point")
            self.input_scale.copy_(input_scale.reshape(()))
            self.input_zero_point.copy_(input_zero_point.reshape(()))
        for name in self.transform_tensors:
            getattr(self, name).copy_(transform_tensors[name])
        if bias is not None:
            if self.bias is None:
                raise ValueError("a layer without a bias cannot have it corrected")
            self.bias.copy_(bias)
        self._changed()

    def deploy(self, product: LayerProduct | None) -> None:
        """Multiplies the codes by `product` where that runs, and keeps no float weight; `None` reverts both.

        On other devices the layer still quantizes and dequantizes, and `arithmetic = "integer"` still gives the exact
        sum.
        """
        self.product, self.keeps_float_weight, self.member = product, product is None, None
        self._changed()

    @property
    def transform_tensors(self) -> tuple[str, ...]:
        """The names of the buffers that hold the input's transform."""
        return () if self.transform is None else self.transform.tensors

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """The quantizer that turns the input into codes; `None` if the input is left in float."""
        grid = self.plan.input_grid
        if grid is None:
            return None
        tensors = {name: getattr(self, name) for name in self.transform_tensors}
        dim = self.operation.channel_dim
        return InputQuantizer(grid, self.input_scale, self.input_zero_point, dim, self.transform, tensors)

    @property
    def weight_int(self) -> Tensor:
        """The integers that are multiplied, int8, `weight_shape`: codes, or codes times multipliers with groups."""
        if not is_packed(self.plan.weight_bits):
            return self.weight_codes
        codes = unpack(self.weight_codes, self.weight_shape, self.code_bits)
        if self.plan.group_size is None:
            return codes
        return codes * per_weight(self.multipliers, self.weight_shape, self.plan.group_size)

    @property
    def multipliers(self) -> Tensor:
        """The multiplier of each group, int8, `[C_out, num_groups]`."""
        return unpacked_multipliers(self.weight_multiplier, self.num_groups)

    def parameters_by_name(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the quantization parameters under the names of the artifact."""
        yield "weight_int", self.weight_int
        if self.plan.group_size is not None:
            yield "weight_multiplier", self.multipliers
        yield "weight_scale", self.weight_scale
        if self.plan.input_grid is not None:
            yield "input_scale", self.input_scale
            yield "input_zero_point", self.input_zero_point
        for name in self.transform_tensors:
            yield name, getattr(self, name)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the quantization parameters under the names of the artifact; nothing is unpacked."""
        shapes: dict[str, tuple[int, ...]] = {"weight_int": self.weight_shape, "weight_scale": self.weight_shape[:1]}
        if self.plan.group_size is not None:
            shapes["weight_multiplier"] = (self.weight_shape[0], self.num_groups)
        if self.plan.input_grid is not None:
            shapes |= {"input_scale": (), "input_zero_point": ()}
        return shapes | dict.fromkeys(self.transform_tensors, (self.in_features,))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output in the current arithmetic and in the dtype of `x`."""
        if self.product is not None and self.arithmetic == "fake-quantize":
            if self.product.runs(self):
                return self.product(self, x)
            if not torch.compiler.is_compiling():
                self.product.fall_back(self)
        quantizer = self.input_quantizer
        if quantizer is not None and self.arithmetic == "integer":
            return self._integer(x, quantizer)
        if quantizer is not None:
            x = quantizer.fake_quantize(x)
        return self.operation(x, self._float_weight().to(x.dtype), self.bias)

    def _integer(self, x: Tensor, quantizer: InputQuantizer) -> Tensor:
        """Returns the output in integer arithmetic, in the dtype of `x`; see the module's second equation."""
        codes = quantizer.codes(x) - quantizer.zero_point
        largest_weight = -weight_grid(self.plan.product_bits).quant_min
        largest = (quantizer.grid.quant_max - quantizer.grid.quant_min) * largest_weight
        accumulated = self.operation.exact(codes, self.weight_int, largest)  # the int32 sum in any order of summation
        y = accumulated.float() * self.operation.per_channel(self.input_scale * self.weight_scale)
        if self.bias is not None:
            y = y + self.operation.per_channel(self.bias.float())
        return y.to(x.dtype)

    def _float_weight(self) -> Tensor:
        """Returns the dequantized weight, float32, which stays in memory if `keeps_float_weight` allows it."""
        if torch.compiler.is_compiling():
            return self._dequantized()
        if not self.keeps_float_weight or not _OFFLOADERS.isdisjoint(self.__dict__):
            self._weight = None
            return self._dequantized()
        # offloading may move buffers one by one, so the device is compared
        if self._weight is None or self._weight.device != self.weight_codes.device:
            self._weight = self._dequantized()
        return self._weight

    def _dequantized(self) -> Tensor:
        scale = self.weight_scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))
        return dequantize(self.weight_int, scale, torch.zeros((), device=scale.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Moves the layer with the model, without casting the scales."""
        super()._apply(keeping_float32(self, fn), recurse)
        self._changed()
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # codes of a convolution may be in channels-last order, which safetensors refuses
        destination[f"{prefix}weight_codes"] = destination[f"{prefix}weight_codes"].contiguous()

    def _changed(self) -> None:
        """Discards or recomputes everything that was computed from the layer's tensors."""
        self._weight = None
        if self.product is not None:
            self.product.prepare(self)

    def extra_repr(self) -> str:
        """Returns the description of the layer that `print(model)` shows."""
        return f"{self.operation.kind}, weight {list(self.weight_shape)}, {self.plan}"


def quantized_layer(
    layer: nn.Module,
    plan: LayerPlan,
    code_bits: Callable[[int], int] = stored_bits,
    device: torch.device | None = None,
) -> QuantizedLayer | SplitLayer:
    """Returns an empty quantized layer for `layer` (`nn.Linear` or `nn.Conv2d`); its codes are zero until filled in.

    Args:
        layer: The layer in full precision; its weight is not read where `device` is given.
        plan: The bits of the layer.
        code_bits: Returns the bits that a code takes in memory and on disk, for its number of bits.
        device: The device of the codes and scales; by default that of the weight.

    Raises:
        TypeError: The layer is neither a linear layer nor a zero-padded convolution.
    """
    operation, whole = Operation.of(layer), weight_shape(layer)
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    device = device or layer.get_parameter("weight").device
    bits = code_bits(plan.weight_bits)
    if plan.channel_parts is None:
        return QuantizedLayer(operation, plan, whole, bias, device, bits)
    parts: list[nn.Module] = []
    for size in plan.channel_parts:
        shape = (whole[0], size, *whole[2:])
        parts.append(QuantizedLayer(operation, plan.part(), shape, None if parts else bias, device, bits))
    return SplitLayer(parts, plan.channel_parts, operation.channel_dim)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Returns every `QuantizedLayer` of a model by dotted name, the parts of split layers one by one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
