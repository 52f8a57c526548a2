r"""The integer products in plain torch: what the kernels are compared with.

    y = (sum s w - correction) * scale + bias + sample_bias + residual

The sum is computed in float64, where it is exact; everything after it is float32, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_kernels.pack import Padding, border_classes, unpack_w4
from edadm_kernels.reference.norms import quantize, signed_codes


def accumulate_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the exact `sum_k x[m, k] weight[n, k]`, float64 `[M, N]`; weights are int8 or packed by `pack_w4`."""
    return x.double() @ _codes(weight).double().T


def accumulate_conv2d(x: Tensor, weight: Tensor, stride: int, padding: Padding, upsample: bool) -> Tensor:
    """Returns the exact sums of a convolution, float64 `[N, O, H', W']`; weights are `[O, kh, kw, C]`."""
    top, bottom, left, right = padding
    inputs = x.double()
    if upsample:
        inputs = inputs.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    kernel = _codes(weight).double().permute(0, 3, 1, 2)
    return F.conv2d(F.pad(inputs, (left, right, top, bottom)), kernel, stride=stride)


def conv_correction(
    table: Tensor, height: int, width: int, kernel: tuple[int, int], stride: int, padding: Padding
) -> Tensor:
    """Returns the correction of each output from a border table: int32 `[O, H', W']` for an input of this size."""
    top, bottom, left, right = padding
    rows = border_classes(height, kernel[0], stride, top, bottom, table.device)
    columns = border_classes(width, kernel[1], stride, left, right, table.device)
    classes = rows[:, None] * ((left + 1) * (right + 1)) + columns  # [H', W']
    return table[classes].permute(2, 0, 1)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes `edadm_kernels.linear`."""
    y = (accumulate_linear(x, weight) - correction).float() * scale
    return _add(y, bias, residual).to(out_dtype)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    corrections: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Computes `edadm_kernels.linears`."""
    members = zip(weights, scales, corrections, biases, strict=True)
    return [linear(x, *member, out_dtype=out_dtype) for member in members]


def linear_stack(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes `edadm_kernels.linear_stack`."""
    biases = [None] * len(x) if bias is None else list(bias)
    members = zip(x, weight, scale, correction, biases, strict=True)
    return torch.stack([linear(*member, out_dtype=out_dtype) for member in members])


def linear_geglu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.linear_geglu`; the activation is float64."""
    y = linear(x, weight, scale, correction, bias, out_dtype=torch.float32)
    value, gate = y.double().unflatten(1, (-1, 2)).unbind(2)
    return quantize(value * F.gelu(gate), out_scale, out_zero_point, num_bits)


def linear_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.linear_to_codes`."""
    y = linear(x, weight, scale, correction, bias, residual, residual.dtype)
    return quantize(y, out_scale, out_zero_point, num_bits)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.linear_gelu`; the activation is float64."""
    y = linear(x, weight, scale, correction, bias, out_dtype=torch.float32).double()
    return quantize(F.gelu(y, approximate="tanh"), out_scale, out_zero_point, num_bits)


def linear_gelu_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.linear_gelu_to_codes`; the activation is float64."""
    y = linear(x, weight, scale, correction, bias, out_dtype=torch.float32).double()
    return signed_codes(F.gelu(y, approximate="tanh").float(), inverse_scale, code_shift, num_bits)


def linear_geglu_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `edadm_kernels.linear_geglu_to_codes`; the activation is float64."""
    value, gate = linear(x, weight, scale, correction, bias, out_dtype=torch.float32).double().chunk(2, dim=1)
    return signed_codes((value * F.gelu(gate)).float(), inverse_scale, code_shift, num_bits)


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None = None,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    upsample: bool = False,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Computes `edadm_kernels.conv2d`."""
    grown = 2 if upsample else 1
    kernel = (weight.shape[1], weight.shape[2])
    spread = conv_correction(correction, x.shape[2] * grown, x.shape[3] * grown, kernel, stride, padding)
    y = (accumulate_conv2d(x, weight, stride, padding, upsample) - spread).float() * _channel(scale)
    y = _add(y, None if bias is None else _channel(bias), None)
    y = _add(y, None if sample_bias is None else sample_bias[:, :, None, None], residual)
    return y.to(out_dtype, memory_format=torch.channels_last)


def linear_added(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    factor: Tensor | None = None,
    more: Tensor | None = None,
) -> Tensor:
    """Computes `edadm_kernels.linear_added`."""
    x = x if more is None else torch.cat([x, more], dim=1)
    return added(linear(x, weight, scale, correction, bias, out_dtype=torch.float32), residual, factor)


def added(y: Tensor, residual: Tensor, factor: Tensor | None) -> Tensor:
    """Returns `residual + factor * y` in the type of the residual, for y `[M, N]` and factors `[samples, N]`."""
    if factor is not None:
        y = (y.unflatten(0, (factor.shape[0], -1)) * factor.float()[:, None]).flatten(0, 1)
    return (residual.float() + y).to(residual.dtype)


def _codes(weight: Tensor) -> Tensor:
    """Returns int8 codes of weights that may be packed."""
    return unpack_w4(weight) if weight.dtype == torch.uint8 else weight


def _channel(values: Tensor) -> Tensor:
    """Returns one value per channel in a shape that broadcasts over images."""
    return values[:, None, None]


def _add(y: Tensor, *terms: Tensor | None) -> Tensor:
    """Returns `y` plus those terms that are there."""
    for term in terms:
        if term is not None:
            y = y + term.float()
    return y
