"""The engine all others are held against: exact integer sums in torch, on any device.

Activations and weights are multiplied as whole numbers in float64, exact below 2^53, so every sum is the int32 sum of
integer hardware; the epilogue (scale, bias) is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.quant.layers import Arithmetic, QuantizedLayer, quantized_layers

# A float32 product over K terms errs by at most about K * 2^-24 of the sum of magnitudes and by sqrt(K) * 2^-24 on
# average; with K up to 23,040 that is 9e-6 of it.
LAYER_BOUND = 1e-5


def use_arithmetic(model: nn.Module, arithmetic: Arithmetic) -> int:
    """Have every quantized layer of `model` compute in `arithmetic`; returns how many there are."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.arithmetic = arithmetic
    return len(layers)


@torch.no_grad()
def layer_parity(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Compare integer arithmetic with quantize-dequantize, layer by layer on equal inputs, in one forward.

    Returns:
        Layer name to |y_int - y_fq| / |y_fq|, L2 norms.
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

    handles = [layer.register_forward_hook(compare(name)) for name, layer in quantized_layers(model).items()]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return errors
