"""The largest rate of multiplication that this machine is seen to reach, in each precision.

A linear layer and a 3x3 convolution of sizes that fill the units are timed alone, and the shortest of several calls
counts, input quantization included in INT8. A denoiser's layers are held against that, and not against a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_cli.bench.contender import milliseconds
from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan

_CALLS = 12
# rows, inputs, outputs of a linear layer; channels and size of a convolution: 6.7 and 7.5 billion multiply-accumulates
_LINEAR = (1024, 2560, 2560)
_CONVOLUTION = (640, 45)
_SCALE_ON_CUDA = 4
"""A GPU is filled by that many times the rows and images."""


def measure_peaks(engine: Engine, options: EngineOptions, dtypes: tuple[str, ...]) -> dict[str, float]:
    """Largest rates in 10^12 operations a second, two to a multiply-accumulate: `int8` on the engine, others in torch.

    Args:
        engine: Multiplies integers.
        options: Device and threads.
        dtypes: Floating-point types, measured in torch.
    """
    factor = _SCALE_ON_CUDA if options.device.type == "cuda" else 1
    linear, convolution = _inputs(factor, options.device)
    rates: dict[str, float] = {}
    integer = [engine.compile_layer(_layer(x), x, options) for x in (linear, convolution)]
    rates["int8"] = max(
        _rate(partial(run, x), x, options.device) for run, x in zip(integer, (linear, convolution), strict=True)
    )
    for name in dtypes:
        dtype = getattr(torch, name)
        rates[name] = max(_rate(_float(x, dtype), x, options.device) for x in (linear, convolution))
    return rates


def _inputs(factor: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, inputs, _ = _LINEAR
    channels, size = _CONVOLUTION
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(factor * rows, inputs, generator=generator)
    convolution = torch.randn(factor, channels, size, size, generator=generator)
    return linear.to(device), convolution.to(device)


def _operation(x: Tensor) -> tuple[Operation, tuple[int, ...]]:
    if x.ndim == 2:
        return Operation("linear"), (_LINEAR[2], _LINEAR[1])
    return Operation("conv2d", padding=(1, 1)), (_CONVOLUTION[0], _CONVOLUTION[0], 3, 3)


def _layer(x: Tensor) -> QuantizedLayer:
    operation, shape = _operation(x)
    layer = QuantizedLayer(operation, LayerPlan(weight_bits=8, activation_bits=8), shape, device=x.device)
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale = torch.full((shape[0],), 1e-3)
    layer.set_parameters(codes, scale, torch.tensor(8 / 255), torch.tensor(128, dtype=torch.int32))
    return layer


def _float(x: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    operation, shape = _operation(x)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.device, dtype)
    own = x.to(dtype)
    if operation.kind == "linear":
        return lambda: F.linear(own, weight)
    weight, own = (tensor.to(memory_format=torch.channels_last) for tensor in (weight, own))
    return lambda: operation(own, weight)


@torch.no_grad()
def _rate(call: Callable[[], Any], x: Tensor, device: torch.device) -> float:
    operation, shape = _operation(x)
    rows = x.shape[0] if operation.kind == "linear" else x.numel() // x.shape[1]
    times = [milliseconds(call, device) for _ in range(_CALLS)]
    return 2 * rows * torch.Size(shape).numel() / (min(times) * 1e9)
