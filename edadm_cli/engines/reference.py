"""The engine that all others are compared with: exact integer sums in torch, on any device.

Activations and weights are multiplied as whole numbers in float64, exact below 2^53, so every sum is the int32 sum of
integer hardware; the epilogue (scale, bias) is float32.
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

# A float32 product over K terms errs by at most about K * 2^-24 of the sum of magnitudes and by sqrt(K) * 2^-24 on
# average; with K up to 23,040 that is 9e-6 of it.
LAYER_BOUND = 1e-5
_ATTENTION_IS_FLOAT = "operands on the integer grids, products in floating point"


class ReferenceEngine(Engine):
    """Exact integer arithmetic, layer by layer, in torch: for parity, not for speed."""

    name = "reference"
    description = "exact integer sums in torch, on any device; slow: what the others are compared with"
    device_types = ("cpu", "cuda")
    layer_bound = 0.0

    def refusal(self, device: torch.device) -> str | None:
        """Returns `None`: the reference runs wherever torch does."""
        if device.type == "cuda" and not torch.cuda.is_available():
            return "The engine 'reference' was to run on CUDA, and this machine has no CUDA device."
        return None

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Only layers without an input quantizer have no integers to multiply."""
        return "its input is not quantized" if layer.plan.input_grid is None else None

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Copies the denoiser and switches its layers to integer arithmetic."""
        self.require(options.device)
        # a model of diffusers has a `to` of its own, which warns of casts that quantized layers know how to take
        copied = nn.Module.to(copy.deepcopy(denoiser), device=options.device, dtype=options.rest_dtype)
        copied.eval().requires_grad_(False)
        use_arithmetic(copied, "integer")
        return _ReferenceDenoiser(copied, options.rest_dtype)

    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Switches a copy of the layer to integer arithmetic."""
        copied = copy.deepcopy(layer).to(device=options.device, dtype=options.rest_dtype)
        copied.arithmetic = "integer"
        return torch.no_grad()(copied.forward)


class _ReferenceDenoiser(CompiledDenoiser):
    def __init__(self, denoiser: nn.Module, rest_dtype: torch.dtype) -> None:
        self._denoiser, self._dtype = denoiser, rest_dtype

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
        """Returns the time of each quantized layer, and of the rest in one row; on CUDA it includes synchronization."""
        times: dict[str, list[float]] = {}
        layers = quantized_layers(self._denoiser)

        def begin(name: str) -> Callable[..., None]:
            return lambda *_: times.setdefault(name, []).append(-_now())

        def end(name: str) -> Callable[..., None]:
            return lambda *_: times[name].append(times[name].pop() + _now())

        started = _now()
        with Hooks() as hooks:
            for name, layer in layers.items():
                hooks.before(layer, begin(name))
                hooks.after(layer, end(name))
            self(*args, **kwargs)
        rows = [
            OperationTime(name, layers[name].operation.kind, "int8", 1e3 * sum(seconds))
            for name, seconds in times.items()
        ]
        rest = 1e3 * (_now() - started) - sum(row.milliseconds for row in rows)
        return [*rows, OperationTime("all else", "other", str(self._dtype).removeprefix("torch."), rest)]


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def use_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> int:
    """Makes every quantized layer of `model` compute in `arithmetic`, and returns how many there are."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.arithmetic = arithmetic
    return len(layers)


@torch.no_grad()
def layer_parity(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Compares integer arithmetic with quantize-dequantize, layer by layer on equal inputs, in one forward.

    Returns:
        The relative error |y_int - y_fq| / |y_fq| of each layer by name, in L2 norms.
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
