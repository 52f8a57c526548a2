"""The reference engine, which all other engines are compared with. It computes exact integer sums in torch.

It multiplies the codes of activations and weights as whole numbers in float64, which is exact below 2^53. Every sum
therefore equals the int32 sum of integer hardware. The epilogue (scale and bias) is float32. It runs on any device.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.base import CompiledDenoiser, Engine, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.listing import list_layers
from edadm_cli.hooks import Hooks
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import Arithmetic, QuantizedLayer, quantized_layers

# A float32 sum of K products has an error of at most about K * 2^-24 times the sum of magnitudes. On average it is
# sqrt(K) * 2^-24 times that sum, which is 9e-6 times for K = 23,040.
LAYER_BOUND = 1e-5
_ATTENTION_IS_FLOAT = "operands on the integer grids, products in floating point"


class ReferenceEngine(Engine):
    """Runs a denoiser in torch, its quantized layers in exact integer arithmetic. It is for parity, not for speed."""

    name = "reference"
    description = "exact integer sums in torch, on any device; slow: what the others are compared with"
    device_types = ("cpu", "cuda")
    layer_bound = 0.0

    def refusal(self, device: torch.device) -> str | None:
        """Returns a sentence if `device` is a CUDA device and there is none; `None` otherwise."""
        if device.type == "cuda" and not torch.cuda.is_available():
            return "The engine 'reference' cannot run on CUDA here, because this machine has no CUDA device."
        return None

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns a clause for a layer whose input is not quantized, which has no integers to multiply."""
        return "its input is not quantized" if layer.plan.input_grid is None else None

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Returns a copy of the denoiser whose quantized layers use integer arithmetic."""
        self.require(options.device)
        # the `to` of diffusers' models warns about casts, which quantized layers support
        copied = nn.Module.to(copy.deepcopy(denoiser), device=options.device, dtype=options.rest_dtype)
        copied.eval().requires_grad_(False)
        use_arithmetic(copied, "integer")
        return _ReferenceDenoiser(copied, options)

    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Returns a copy of the layer that uses integer arithmetic."""
        copied = copy.deepcopy(layer).to(device=options.device, dtype=options.rest_dtype)
        copied.arithmetic = "integer"
        return torch.no_grad()(copied.forward)


class _ReferenceDenoiser(CompiledDenoiser):
    def __init__(self, denoiser: nn.Module, options: EngineOptions) -> None:
        self._denoiser, self._dtype, self._device = denoiser, options.rest_dtype, options.device

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._denoiser(*args, **kwargs)

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        def decide(name: str, layer: nn.Module) -> tuple[str, str | None]:
            if isinstance(layer, QuantizedAttention):
                return str(self._dtype).removeprefix("torch."), _ATTENTION_IS_FLOAT
            return "int8", None

        return list_layers(self._denoiser, self._dtype, decide)

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns the time of each quantized layer, and one row for the rest; CUDA times include synchronization."""
        times: dict[str, list[float]] = {}
        layers = quantized_layers(self._denoiser)

        def begin(name: str) -> Callable[..., None]:
            return lambda *_: times.setdefault(name, []).append(-self._now())

        def end(name: str) -> Callable[..., None]:
            return lambda *_: times[name].append(times[name].pop() + self._now())

        started = self._now()
        with Hooks() as hooks:
            for name, layer in layers.items():
                hooks.before(layer, begin(name))
                hooks.after(layer, end(name))
            self(*args, **kwargs)
        rows = [
            OperationTime(name, layers[name].operation.kind, "int8", 1e3 * sum(seconds))
            for name, seconds in times.items()
        ]
        rest = 1e3 * (self._now() - started) - sum(row.milliseconds for row in rows)
        return [*rows, OperationTime("all else", "other", str(self._dtype).removeprefix("torch."), rest)]

    def _now(self) -> float:
        """Returns the seconds of the clock when everything that was launched on the device has run."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def use_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> int:
    """Makes every quantized layer of `model` compute in `arithmetic`, and returns the number of these layers."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.arithmetic = arithmetic
    return len(layers)


@torch.no_grad()
def layer_parity(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Compares integer arithmetic with quantize-dequantize, layer by layer on equal inputs, in one call of `model`.

    Returns:
        The relative error |y_int - y_fq| / |y_fq| of each layer by name, in L2 norms. Here y_fq is the output with
        quantize-dequantize; if it is zero, the error is |y_int|.
    """
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: QuantizedLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before, layer.arithmetic = layer.arithmetic, "integer"
            exact = layer.forward(inputs[0])
            layer.arithmetic = before
            norm = output.float().norm()
            errors[name] = float((exact.float() - output.float()).norm() / norm) if norm > 0 else float(exact.norm())

        return hook

    with Hooks() as hooks:
        for name, layer in quantized_layers(model).items():
            hooks.after(layer, compare(name))
        model(*args, **kwargs)
    return errors
