"""Records the kernel calls of a step, and finds for each what a library would run in half precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_kernels.tiles import Kind

PRODUCTS = ("linear", "linear_geglu", "linear_to_codes", "conv2d")


@dataclass(frozen=True)
class TensorLike:
    """Shape, strides and element type of an argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> TensorLike:
        """Returns the shape, strides and element type of a tensor."""
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def random(self, generator: torch.Generator) -> Tensor:
        """Returns random values: codes of the whole range, floats around zero, or small positive scales."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=generator.device)
        if self.dtype in (torch.int8, torch.uint8):
            info = torch.iinfo(self.dtype)
            return x.random_(info.min, info.max + 1, generator=generator)
        if self.dtype == torch.int32:
            return x.random_(100, 150, generator=generator)
        return x.normal_(generator=generator)


@dataclass(frozen=True)
class KernelCall:
    """One operation of `edadm` with its arguments, tensors replaced by `TensorLike`."""

    operation: str
    arguments: tuple[Any, ...]

    def make(self, generator: torch.Generator) -> list[Any]:
        """Returns new random arguments; scales are positive and small."""
        made = []
        for index, argument in enumerate(self.arguments):
            value = argument.random(generator) if isinstance(argument, TensorLike) else argument
            if isinstance(value, Tensor) and index in _SCALES[self.operation]:
                value = value.abs_().mul_(0.02).add_(0.005)
            made.append(value)
        if self.is_product:
            made[2] /= math.sqrt(self.matrix()[2])  # sums grow with the root of their length and must fit float16
        return made

    def run(self, arguments: list[Any]) -> Any:
        """Calls the operation."""
        return getattr(torch.ops.edadm, self.operation)(*arguments)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the arguments."""
        return sum(a.num_bytes for a in self.arguments if isinstance(a, TensorLike))

    @property
    def output_bytes(self) -> int:
        """Returns the bytes that a product writes: codes or float16; a gated one writes half as many."""
        m, n, _ = self.matrix()
        return int(m * n * {"linear_geglu": 0.5, "linear_to_codes": 1}.get(self.operation, 2))

    @property
    def is_product(self) -> bool:
        """Returns whether the call is a product."""
        return self.operation in PRODUCTS

    @property
    def adds(self) -> bool:
        """Returns whether a product adds a residual."""
        index = {"linear": 5, "linear_to_codes": 5, "conv2d": 6}.get(self.operation)
        return index is not None and self.arguments[index] is not None

    @property
    def packed(self) -> bool:
        """Returns whether the weights are packed, two codes per byte."""
        return self.is_product and self.arguments[1].dtype == torch.uint8

    def matrix(self) -> tuple[int, int, int]:
        """Returns M, N and K of a product."""
        x, weight = self.arguments[0].shape, self.arguments[1].shape
        k = torch.Size(weight[1:]).numel() * (2 if self.packed else 1)
        if self.operation != "conv2d":
            return x[0], weight[0], k
        height, width = self.output_size()
        return x[0] * height * width, weight[0], k

    def output_size(self) -> tuple[int, int]:
        """Returns the height and width of a convolution's output."""
        x, weight = self.arguments[0].shape, self.arguments[1].shape
        stride, (top, bottom, left, right), upsample = self.arguments[7:10]
        grown = 2 if upsample else 1
        return (
            (x[2] * grown + top + bottom - weight[1]) // stride + 1,
            (x[3] * grown + left + right - weight[2]) // stride + 1,
        )

    def kind(self) -> Kind:
        """Returns the kind of kernel of a product."""
        if self.operation != "conv2d":
            return "geglu" if self.operation == "linear_geglu" else "linear"
        stride, padding, upsample = self.arguments[7:10]
        pointwise = self.arguments[1].shape[1:3] == (1, 1) and stride == 1 and not any(padding) and not upsample
        return "linear" if pointwise else "conv"

    def joined(self, arguments: Sequence[Any]) -> Any:
        """Returns the second image of a GroupNorm or a quantization of two images; `None` for any other call."""
        if self.operation == "quantize_joined":
            return arguments[1]
        return arguments[9] if self.operation == "group_norm_quantize" and len(arguments) > 9 else None

    def label(self) -> str:
        """Returns the name of the call for tables."""
        x = "x".join(map(str, self.arguments[0].shape))
        if self.operation == "attention_quantize":
            return f"{self.operation} {x}, {self.arguments[1].shape[1]} keys"
        if (more := self.joined(self.arguments)) is not None:
            x = "x".join(map(str, (more.shape[0], self.arguments[0].shape[1] + more.shape[1], *more.shape[2:])))
        if not self.is_product:
            return f"{self.operation} {x}"
        extras = []
        if self.operation == "conv2d":
            stride, _, upsample = self.arguments[7:10]
            extras = [f"/{stride}"] * (stride != 1) + ["up"] * upsample
        weight = "x".join(map(str, self.arguments[1].shape))
        return " ".join([self.operation, x, "*", weight, *extras])


# Which arguments are scales, by operation
_SCALES = {
    "attention_quantize": (5,),
    "quantize": (1,),
    "quantize_joined": (2,),
    "silu_quantize": (1,),
    "linear": (2,),
    "linear_geglu": (2, 5),
    "linear_to_codes": (2, 6),
    "conv2d": (2,),
    "group_norm": (),
    "group_norm_quantize": (6,),
    "layer_norm_quantize": (4,),
}


class CallRecorder(TorchDispatchMode):
    """Records every call of an `edadm` operation, and counts other operations, inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[KernelCall, int] = {}
        self.layers: dict[KernelCall, set[str]] = {}
        self.attentions: dict[tuple[TensorLike, ...], int] = {}
        self.others: dict[str, int] = {}
        self._layer = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "edadm":
            known = [_frozen(a) for a in args]
            defaults = [
                _frozen((kwargs or {}).get(a.name, a.default_value)) for a in func._schema.arguments[len(args) :]
            ]
            call = KernelCall(func._schema.name.split("::")[1], (*known, *defaults))
            self.calls[call] = self.calls.get(call, 0) + 1
            self.layers.setdefault(call, set()).add(self._layer)
        elif not func.is_view:
            name = func._schema.name.split("::")[1]
            self.others[name] = self.others.get(name, 0) + 1
            if name.startswith("_scaled_dot_product"):
                shapes = tuple(TensorLike.of(operand) for operand in args[:3])
                self.attentions[shapes] = self.attentions.get(shapes, 0) + 1
        return result

    def named(self, layer: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns a `product` whose calls are recorded as those of `layer`."""

        def run(*args: Any, **kwargs: Any) -> Tensor:
            self._layer = layer
            try:
                return product(*args, **kwargs)
            finally:
                self._layer = ""

        return run


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorLike.of(value)
    return tuple(value) if isinstance(value, list) else value


def half_precision(call: KernelCall, arguments: list[Any]) -> Callable[[], Any]:
    """Returns what torch runs in float16 instead: cuDNN and cuBLAS for products, torch's norms, or a copy."""
    x = arguments[0]
    if call.operation == "conv2d":
        return _convolution(call, arguments)
    if call.operation in ("linear", "linear_geglu", "linear_to_codes"):
        rows = torch.randn(x.shape, dtype=torch.float16, device=x.device)
        matrix = _half_weight(call, arguments[1])
        bias = None if arguments[4] is None else arguments[4].half()
        if call.operation == "linear_geglu":
            return lambda: _geglu(F.linear(rows, matrix, bias))
        residual = arguments[5]
        if residual is None:
            return lambda: F.linear(rows, matrix, bias)
        half = residual.half()
        return lambda: F.linear(rows, matrix, bias) + half
    if call.operation == "attention_quantize":
        split = [operand.unflatten(-1, (arguments[3], -1)).transpose(1, 2) for operand in arguments[:3]]
        return lambda: F.scaled_dot_product_attention(split[0], split[1], split[2], scale=arguments[4])
    half = x.half()
    if call.operation in ("group_norm", "group_norm_quantize"):
        weight, bias, groups, eps, silu = arguments[1].half(), arguments[2].half(), *arguments[3:6]
        after = F.silu if silu else lambda y: y
        if (more := call.joined(arguments)) is not None:
            other = more.half()
            return lambda: after(F.group_norm(torch.cat([half, other], dim=1), groups, weight, bias, eps))
        return lambda: after(F.group_norm(half, groups, weight, bias, eps))
    if call.operation == "layer_norm_quantize":
        weight, bias, eps = arguments[1].half(), arguments[2].half(), arguments[3]
        return lambda: F.layer_norm(half, weight.shape, weight, bias, eps)
    if (more := call.joined(arguments)) is not None:
        other = more.half()
        return lambda: torch.cat([half, other], dim=1)
    return lambda: half.clone()


def _convolution(call: KernelCall, arguments: list[Any]) -> Callable[[], Any]:
    x, bias, sample_bias, residual = arguments[0], *arguments[4:7]
    stride, (top, bottom, left, right), upsample = arguments[7:10]
    image = torch.randn(x.shape, dtype=torch.float16, device=x.device).to(memory_format=torch.channels_last)
    weight = _half_weight(call, arguments[1]).permute(0, 3, 1, 2)
    half_bias = None if bias is None else bias.half()
    by_sample = None if sample_bias is None else sample_bias[:, :, None, None]
    added = [tensor.half() for tensor in (by_sample, residual) if tensor is not None]

    def run() -> Tensor:
        source = F.interpolate(image, scale_factor=2.0, mode="nearest") if upsample else image
        if (top, left) != (bottom, right):
            y = F.conv2d(F.pad(source, (left, right, top, bottom)), weight, half_bias, stride=stride)
        else:
            y = F.conv2d(source, weight, half_bias, stride=stride, padding=(top, left))
        for half in added:
            y = y + half
        return y

    return run


def _half_weight(call: KernelCall, weight: Tensor) -> Tensor:
    shape = (*weight.shape[:-1], weight.shape[-1] * (2 if call.packed else 1))
    return torch.randn(shape, dtype=torch.float16, device=weight.device) * 0.02


def _geglu(y: Tensor) -> Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate)
