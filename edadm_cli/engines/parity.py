r"""Compares an engine with exact integer arithmetic, layer by layer on equal inputs.

    error = |y_engine - y_exact|_2 / |y_exact|_2

The denoiser runs once in exact integers. The engine computes each layer on the input that this run gives the layer, at
the time the layer runs, so only one input is held at a time. The result of the run is the prediction that the engine's
own prediction is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.engines.results import require_like
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

ALL_LAYERS_UP_TO = 120
"""In a denoiser with more quantized layers, only one layer of each signature is checked."""


@dataclass(frozen=True)
class LayerParity:
    """Holds the result of the comparison.

    Attributes:
        errors: The relative L2 error of each layer that was checked, by name.
        refused: The engine's reason for each layer that it does not run in integers, by name.
        num_layers: The number of quantized layers.
        prediction: The denoiser's prediction, computed in exact integers and, for the rest, in float32.
    """

    errors: dict[str, float]
    refused: dict[str, str]
    num_layers: int
    prediction: Tensor

    @property
    def worst(self) -> tuple[str, float]:
        """Returns the name and error of the layer with the largest error; NaN counts as the largest."""
        name = max(self.errors, key=lambda key: _order(self.errors[key]))
        return name, self.errors[name]


def signature(layer: QuantizedLayer, shape: tuple[int, ...]) -> tuple[object, ...]:
    """Returns all that decides which code runs a layer: its operation, its plan, its shapes, and whether it has a bias.

    `shape` is the shape of the layer's input.
    """
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
    """Runs `denoiser` once in exact integers, and each of its layers also on `engine`.

    Args:
        engine: The engine that is checked.
        denoiser: A denoiser with quantized layers, float32 otherwise. The arithmetic of its layers is restored.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        options: The options of the engine, with `rest_dtype` float32, for which its `layer_bound` holds.
        advance: The progress callback, which is called with 1 after each quantized layer.
        all_layers_up_to: In a denoiser with more quantized layers, only the first of each `signature` is checked.

    Raises:
        MachineError: The engine returned something else than a tensor with the shape of a layer's output.
    """
    layers = quantized_layers(denoiser)
    checks_all = len(layers) <= all_layers_up_to
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
            if checks_all or key not in seen:
                seen.add(key)
                run = engine.compile_layer(layer, inputs[0], options)
                errors[name] = relative_l2(require_like(engine, f"the layer '{name}'", run(inputs[0]), exact), exact)

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


def relative_l2(values: Tensor, expected: Tensor) -> float:
    """Returns |values - expected| / |expected|, computed in float64; if `expected` is zero, it returns |values|."""
    exact = expected.detach().double().cpu()
    norm = float(exact.norm())
    distance = float((values.detach().double().cpu() - exact).norm())
    return distance / norm if norm > 0 else distance


def _order(error: float) -> float:
    return float("inf") if error != error else error
