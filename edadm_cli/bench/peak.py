"""Measures the highest multiplication rate that this machine reaches in each precision.

A linear layer and a 3x3 convolution, large enough to fill the arithmetic units, are timed alone. The shortest of
several calls counts; in INT8 it includes the quantization of the input. `bench` compares the layers of a denoiser with
these rates rather than with those of a data sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.bench.algorithms import choose_algorithms
from edadm_cli.bench.spec import milliseconds
from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan

_TIMES = 12


@dataclass(frozen=True)
class Sizes:
    """The sizes of the layers that are timed.

    Attributes:
        linear: Rows, inputs and outputs of a linear layer.
        convolution: Images, channels, and height and width of a convolution.
        in_a_row: Successive calls per timing: a GPU computes while its next call is prepared.
    """

    linear: tuple[int, int, int]
    convolution: tuple[int, int, int]
    in_a_row: int = 1


# 6.7 and 7.5 billion multiply-accumulates on a CPU, 550 and 483 on a GPU: quantization takes little time beside them
SIZES = {"cpu": Sizes((1024, 2560, 2560), (1, 640, 45)), "cuda": Sizes((8192, 8192, 8192), (8, 1280, 64), 8)}


def measure_peaks(
    engine: Engine, options: EngineOptions, dtypes: tuple[str, ...], sizes: Sizes | None = None
) -> dict[str, float]:
    """Returns the highest rates by precision, in 10^12 operations per second; a multiply-accumulate is two operations.

    The rate of `int8` is measured on the engine, those of floating-point types are measured in torch.

    Args:
        engine: The engine that multiplies integers.
        options: The device and the threads.
        dtypes: Floating-point types, measured in torch.
        sizes: The sizes of the layers; `None` takes sizes that fill the device.
    """
    device, sizes = options.device, sizes or SIZES[options.device.type]
    layers = [_Layer(sizes.linear, device, is_linear=True), _Layer(sizes.convolution, device, is_linear=False)]
    rates = {"int8": max(layer.rate(layer.on(engine, options), sizes.in_a_row) for layer in layers)}
    for name in dtypes:
        calls = [(layer, layer.in_torch(getattr(torch, name))) for layer in layers]
        rates[name] = max(choose_algorithms(partial(layer.rate, call, sizes.in_a_row), device) for layer, call in calls)
    return rates


class _Layer:
    """A linear layer or a 3x3 convolution, together with an input for it.

    Args:
        size: The size of the layer, as in `Sizes`.
        device: The device of the layer and its input.
        is_linear: Whether it is the linear layer.
    """

    def __init__(self, size: tuple[int, int, int], device: torch.device, is_linear: bool) -> None:
        self._device, self._is_linear = device, is_linear
        self._shape: tuple[int, ...]
        shape: tuple[int, ...]
        if is_linear:
            rows, inputs, outputs = size
            self._operation, self._shape, shape = Operation("linear"), (outputs, inputs), (rows, inputs)
        else:
            images, channels, side = size
            self._operation, self._shape = Operation("conv2d", padding=(1, 1)), (channels, channels, 3, 3)
            shape = (images, channels, side, side)
        self._x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def on(self, engine: Engine, options: EngineOptions) -> Callable[[], Any]:
        """Returns a call of the layer on an engine, with weights and activations of eight bits."""
        layer = QuantizedLayer(self._operation, LayerPlan(weight_bits=8, activation_bits=8), self._shape)
        codes = torch.randint(-127, 128, self._shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
        if self._device.type == "cpu":
            codes //= 2  # some processors saturate when they add products of codes wider than seven bits
        scale = torch.full((self._shape[0],), 1e-3)
        layer.set_parameters(codes, scale, torch.tensor(8 / 255), torch.tensor(128, dtype=torch.int32))
        nn.Module.to(layer, self._device)
        x = self._in_memory_order(self._x.to(options.rest_dtype))
        return partial(engine.compile_layer(layer, x, options), x)

    def in_torch(self, dtype: torch.dtype) -> Callable[[], Any]:
        """Returns a call of the layer in torch, in a floating-point type."""
        weight = torch.randn(self._shape, generator=torch.Generator().manual_seed(1)).to(self._device, dtype)
        return partial(self._operation, self._in_memory_order(self._x.to(dtype)), self._in_memory_order(weight))

    @torch.no_grad()
    def rate(self, call: Callable[[], Any], in_a_row: int) -> float:
        """Returns the rate of a call in 10^12 operations per second, from the shortest of several timings."""
        rows = self._x.numel() // self._x.shape[1]

        def calls() -> None:
            for _ in range(in_a_row):
                call()

        shortest = min(milliseconds(calls, self._device) for _ in range(_TIMES))
        return 2 * rows * math.prod(self._shape) * in_a_row / (shortest * 1e9)

    def _in_memory_order(self, x: Tensor) -> Tensor:
        return x if self._is_linear else x.to(memory_format=torch.channels_last)
