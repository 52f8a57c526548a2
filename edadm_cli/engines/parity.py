r"""An engine compared with exact integer arithmetic, layer by layer on equal inputs.

    error = |y_engine - y_exact|_2 / |y_exact|_2

One forward of the denoiser in exact integers feeds every layer; each layer's input is shown to the engine as it comes
by, so that only one is held at a time. The forward's own result is what the engine's prediction is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.hooks import Hooks
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

ALL_LAYERS_UP_TO = 120
"""Networks with more quantized layers are checked with one layer of each signature."""


@dataclass(frozen=True)
class LayerParity:
    """The result of the comparison.

    Attributes:
        errors: Layer name to relative L2 error, of the layers that were checked.
        refused: Layer name to the engine's reason, of those that it does not run in integers.
        num_layers: Quantized layers there are.
        prediction: The denoiser's prediction in exact integers, a float32 rest.
    """

    errors: dict[str, float]
    refused: dict[str, str]
    num_layers: int
    prediction: Tensor

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error; an error that is not a number is the largest."""
        name = max(self.errors, key=lambda key: _order(self.errors[key]))
        return name, self.errors[name]


def signature(layer: QuantizedLayer, shape: tuple[int, ...]) -> tuple[object, ...]:
    """Returns what decides the code that runs a layer: operation, bits, shapes, whether there is a bias."""
    return layer.operation, layer.plan, layer.weight_shape, shape, layer.bias is not None


@torch.no_grad()
def compare_layers(
    engine: Engine,
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: EngineOptions,
    advance: Callable[[int], None] = lambda _: None,
    all_layers_up_to: int = ALL_LAYERS_UP_TO,
) -> LayerParity:
    """Runs `denoiser` once in exact integers and each of its layers on `engine` besides.

    Args:
        engine: What is checked.
        denoiser: With quantized layers and a float32 rest; its arithmetic is restored.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        options: The options of the engine; its rest is float32, for which its `layer_bound` holds.
        advance: Told of every quantized layer that has run.
        all_layers_up_to: In a network with more layers, only the first of each `signature` is checked.
    """
    layers = quantized_layers(denoiser)
    every = len(layers) <= all_layers_up_to
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    seen: set[tuple[object, ...]] = set()

    def check(name: str) -> Callable[..., None]:
        def hook(layer: QuantizedLayer, inputs: tuple[Tensor, ...], exact: Tensor) -> None:
            advance(1)
            reason = engine.layer_refusal(layer)
            if reason is not None:
                refused[name] = reason
                return
            key = signature(layer, tuple(inputs[0].shape))
            if every or key not in seen:
                seen.add(key)
                run = engine.compile_layer(layer, inputs[0], options)
                errors[name] = relative_l2(run(inputs[0]), exact)

        return hook

    before = {name: layer.arithmetic for name, layer in layers.items()}
    try:
        with Hooks() as hooks:
            for name, layer in layers.items():
                layer.arithmetic = "integer"
                hooks.after(layer, check(name))
            output = denoiser(*args, **kwargs)
    finally:
        for name, layer in layers.items():
            layer.arithmetic = before[name]
    return LayerParity(errors, refused, len(layers), prediction_of(output))


def prediction_of(output: Any) -> Tensor:
    """Returns the prediction in what a denoiser returns: an output object, a tuple, or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    first: Tensor = output[0]
    return first


def relative_l2(values: Tensor, expected: Tensor) -> float:
    """Returns |values - expected| / |expected| in float64; where `expected` is zero, |values|."""
    exact = expected.detach().double().cpu()
    norm = float(exact.norm())
    distance = float((values.detach().double().cpu() - exact).norm())
    return distance / norm if norm > 0 else distance


def _order(error: float) -> float:
    return float("inf") if error != error else error
