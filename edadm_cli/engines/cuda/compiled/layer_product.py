r"""Runs quantized layers of a loaded export by multiplying codes, in eager torch and under `torch.compile`.

    s = clamp(rne(x * (1 / x_scale)) + (zero_point - 128), -128, 2^bits - 129),   y = product(s, w_int)

Under `torch.compile`, plain operations compute the codes, and Inductor fuses them into the normalization, gate or
addition before the layer. In eager torch, one kernel computes the codes. The product is a custom operation that
includes the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.shared_input import share_inputs
from edadm_cli.engines.cuda.graph_passes.graph_pass import exchange_in_graphs
from edadm_cli.engines.cuda.products.layout import channels_last, image_of, quantizable, rows_of
from edadm_cli.engines.cuda.products.lowering import FLOAT_INPUT, product_refusal
from edadm_cli.integrations.notices import say_once
from edadm_cli.quant.layers import QuantizedLayer
from edadm_kernels import pack

MIN_CAPABILITY = (8, 0)
"""The least compute capability of a GPU whose integer tensor cores the kernels support."""
ON_CPU = (
    "On a CPU this exported denoiser computes in floating point, from its integer codes in every step: "
    "edadm_cli.load(folder) is the fast way to run it there, in integers."
)
_OFFLOADED = "their weights are offloaded layer by layer; enable_model_cpu_offload() moves them as a whole"
_BUFFERS = ("product_weight", "product_scale", "product_correction", "product_bias", "inverse_scale", "code_shift")


def capability_refusal(device: torch.device) -> str | None:
    """Returns a clause that says why the kernels cannot run on a CUDA device of this machine; `None` if they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    expected, actual = ".".join(map(str, MIN_CAPABILITY)), ".".join(map(str, capability))
    return f"the kernels need compute capability {expected} or later, and this device has {actual}"


class KernelProduct:
    """Multiplies the codes of layers with the operations of `edadm_kernels`.

    A supported layer gets these buffers, which are not persistent: `product_scale` and `product_bias`, float32
    `[C_out]`; `product_correction`, int32; `inverse_scale` and `code_shift`, float32 `()`; and, if two codes are stored
    per byte, `product_weight`, the same codes as int8. Codes of a convolution are stored channels last.

    Args:
        device_types: The types of the supported devices. On a CPU the operations are exact and slow.
    """

    def __init__(self, device_types: tuple[str, ...] = ("cuda",)) -> None:
        self.device_types = device_types

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelProduct:
        """Returns the object itself, because blocks whose layers share the product share their compilation."""
        return self

    def prepare(self, layer: QuantizedLayer) -> None:
        """Computes the buffers of a layer on a supported device, and removes those of another device."""
        for name in _BUFFERS:
            layer._buffers.pop(name, None)
            layer._non_persistent_buffers_set.discard(name)
        if self._refusal(layer) is None:
            self._fill(layer)
        elif layer.weight_codes.ndim == 4 and layer.weight_codes.device.type in self.device_types:
            # torch's convolution then writes its output channels last, as the kernels do
            layer.weight_codes = channels_last(layer.weight_codes)
        if layer.member is not None:
            layer.member.shared.renew()

    def join(self, model: nn.Module) -> None:
        """Finds the layers of a model that share their input, which then run in one launch."""
        share_inputs(model)

    def runs(self, layer: QuantizedLayer) -> bool:
        """Returns whether the layer has its buffers on the device of its codes."""
        scale: Tensor | None = getattr(layer, "product_scale", None)
        return scale is not None and scale.device == layer.weight_codes.device

    def fall_back(self, layer: QuantizedLayer) -> None:
        """Warns once that layers compute in floating point, and says why."""
        device = layer.weight_codes.device
        if device.type == "cpu" and "cpu" not in self.device_types:
            say_once(ON_CPU)
            return
        reason = self._refusal(layer) or _OFFLOADED
        if reason != FLOAT_INPUT:  # as planned
            say_once(f"Layers of this exported denoiser compute in floating point on {device.type}: {reason}.")

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Quantizes `x`, multiplies, adds the bias, and returns the layer's output."""
        if layer.member is not None and layer.member.shared.is_active:
            y: Tensor | None = layer.member.shared.take(layer.member.place, x, self._linears)
            if y is not None:
                return y
        if layer.operation.kind == "linear":
            codes = self.codes(layer, x)
            y = self.linear(layer, as_rows(codes), x.dtype)
            return y.view(*codes.shape[:-1], y.shape[-1])
        codes = channels_last(self.codes(layer, x))
        if layer.operation.is_pointwise(layer.weight_shape):
            y = self.linear(layer, rows_of(codes), x.dtype)
            return image_of(y, codes.shape[0], codes.shape[2], codes.shape[3])
        return self._convolve(layer, codes, x.dtype)

    def _refusal(self, layer: QuantizedLayer) -> str | None:
        device = layer.weight_codes.device
        if device.type not in self.device_types:
            return f"the kernels do not run on {device.type}"
        if layer.plan.input_grid is None:
            return FLOAT_INPUT
        return (capability_refusal(device) if device.type == "cuda" else None) or product_refusal(layer)

    def _fill(self, layer: QuantizedLayer) -> None:
        codes, zero_point, operation = layer.weight_int, layer.input_zero_point, layer.operation
        is_packed = codes is not layer.weight_codes
        if operation.kind == "linear" or operation.is_pointwise(layer.weight_shape):
            rows = codes.flatten(1)
            correction = pack.linear_correction(rows, zero_point)
        else:
            rows = codes.permute(0, 2, 3, 1).contiguous()
            correction = pack.conv_border_table(rows, zero_point, _sides(layer))
            if not is_packed:
                layer.weight_codes = rows.permute(0, 3, 1, 2)  # the same elements, in the order of the kernels
        tensors = {
            "product_weight": rows if is_packed else None,
            "product_scale": layer.input_scale * layer.weight_scale,
            "product_correction": correction,
            "product_bias": None if layer.bias is None else layer.bias.detach().float().contiguous(),
            "inverse_scale": layer.input_scale.reciprocal(),
            "code_shift": zero_point.float() - pack.CODE_OFFSET,
        }
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor, persistent=False)

    def codes(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Returns the codes of `x`, int8, in the shape of `x`."""
        bits = layer.plan.activation_bits
        assert bits is not None
        if layer.transform is not None:
            quantizer = layer.input_quantizer
            assert quantizer is not None
            x = quantizer.transformed(x)
        if not torch.compiler.is_compiling():
            return kernels.quantize(quantizable(x), layer.input_scale, layer.input_zero_point, bits)
        exchange_in_graphs()
        codes = torch.round(x.float() * _buffer(layer, "inverse_scale")) + _buffer(layer, "code_shift")
        return codes.clamp(-pack.CODE_OFFSET, (1 << bits) - 1 - pack.CODE_OFFSET).to(torch.int8)

    def weight(self, layer: QuantizedLayer) -> Tensor:
        """Returns the codes in the order of the kernels: `[C_out, K]` or `[C_out, kh, kw, C_in]`, a view."""
        unpacked: Tensor | None = getattr(layer, "product_weight", None)
        if unpacked is not None:
            return unpacked
        codes = layer.weight_codes
        is_matrix = codes.ndim == 2 or layer.operation.is_pointwise(layer.weight_shape)
        return codes.flatten(1) if is_matrix else codes.permute(0, 2, 3, 1)

    def _linears(self, layers: Sequence[QuantizedLayer], x: Tensor) -> list[Tensor]:
        """Returns the outputs of linear layers with equal quantizers for one input."""
        codes = self.codes(layers[0], x)
        outputs = kernels.linears(
            as_rows(codes),
            [self.weight(layer) for layer in layers],
            [_buffer(layer, "product_scale") for layer in layers],
            [_buffer(layer, "product_correction") for layer in layers],
            [_buffer(layer, "product_bias") for layer in layers],
            out_dtype=x.dtype,
        )
        return [y.view(*codes.shape[:-1], y.shape[-1]) for y in outputs]

    def linear(self, layer: QuantizedLayer, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the product `[M, N]` of codes `[M, K]`, in an element type."""
        return kernels.linear(
            rows,
            self.weight(layer),
            _buffer(layer, "product_scale"),
            _buffer(layer, "product_correction"),
            _buffer(layer, "product_bias"),
            out_dtype=dtype,
        )

    def _convolve(self, layer: QuantizedLayer, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.conv2d(
            codes,
            self.weight(layer),
            _buffer(layer, "product_scale"),
            _buffer(layer, "product_correction"),
            _buffer(layer, "product_bias"),
            stride=layer.operation.stride[0],
            padding=_sides(layer),
            out_dtype=dtype,
        )


def as_rows(codes: Tensor) -> Tensor:
    """Returns codes `[..., K]` as rows `[M, K]`."""
    return codes.reshape(-1, codes.shape[-1]).contiguous()


def _buffer(layer: QuantizedLayer, name: str) -> Any:
    return getattr(layer, name)


def _sides(layer: QuantizedLayer) -> tuple[int, int, int, int]:
    """Returns the padding at the top, bottom, left and right."""
    down, right = layer.operation.padding
    return down, down, right, right
