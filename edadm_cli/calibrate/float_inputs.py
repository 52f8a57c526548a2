r"""Chooses the layers whose inputs are left in float: those whose rounding changes the prediction most.

Rounding the input x_l of layer l changes the prediction by J_l d_l to first order, with d_l = x_hat_l - x_l. For a
random v with independent elements of variance 1,

    E[(v . J_l d_l)^2] = |J_l d_l|^2,   v . J_l d_l = g_l . d_l,   g_l = the gradient of v . prediction in x_l,

so that one backward pass per call estimates the errors that all layers cause. The layers whose inputs are left in float
share a budget of multiplications, and those with the largest error per multiplication come first.

References:
    Hutchinson's estimator, doi 10.1080/03610919008812866 (random projections of a Jacobian's columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.ranges import search_activation_ranges
from edadm_cli.calibrate.transforming import input_quantizer
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import RangeRecipe

_SMALLEST_HARM = 0.01
_TINY = 1e-30


@dataclass(frozen=True)
class InputHarm:
    """The harm of rounding the input of one layer, and the cost of the layer.

    Attributes:
        harm: The layer's share, from 0 to 1, of the squared error that rounding all inputs causes. It is the mean of
            two shares: that of the error summed over all calls, which calls with large errors dominate, and the mean of
            the shares of single calls.
        products: The number of multiplications of the layer per row of the denoiser's call.
    """

    harm: float
    products: float


def find_float_inputs(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    range_calls: Sequence[Call],
    calls: Iterable[Call],
    seed: int,
) -> list[str]:
    """Returns the layers whose inputs are the most harmful to round, within the recipe's share of multiplications.

    Args:
        denoiser: The denoiser with its full-precision layers in place.
        traced: The trace of the denoiser.
        plan: The bits of every layer.
        recipe: The options of the range search, and the share.
        range_calls: The `(args, kwargs)` of the denoiser's calls on which ranges are searched.
        calls: The `(args, kwargs)` of calls with a few rows each, which hold samples of similar steps.
        seed: The seed of the random directions.
    """
    ranges = search_activation_ranges(denoiser, traced, plan, recipe, range_calls)
    errors, products = measure_input_errors(denoiser, traced, plan, ranges, calls, seed)
    return choose_float_inputs(errors, products, recipe.float_input_share)


def with_float_inputs(plan: QuantizationPlan, layers: Iterable[str]) -> QuantizationPlan:
    """Returns the plan with the inputs of some layers left in float, and without their transforms."""
    changes = {"activation_bits": None, "transform": None}
    changed = {name: plan.layers[name].model_copy(update=changes) for name in layers}
    return plan.model_copy(update={"layers": plan.layers | changed})


def choose_float_inputs(errors: Mapping[str, InputHarm], total_products: float, share: float) -> list[str]:
    """Returns the layers whose inputs are left in float; together they have at most `share` of `total_products`.

    Layers with the largest harm per multiplication come first. A layer with a harm below 1% is never chosen.
    """
    chosen, left = [], share * total_products
    ranked = sorted(errors.items(), key=lambda item: item[1].harm / max(item[1].products, 1.0), reverse=True)
    for name, error in ranked:
        if error.harm >= _SMALLEST_HARM and error.products <= left:
            chosen.append(name)
            left -= error.products
    return chosen


def measure_input_errors(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
    calls: Iterable[Call],
    seed: int,
) -> tuple[dict[str, InputHarm], float]:
    """Estimates the error of the prediction that rounding each input causes.

    Args:
        denoiser: The denoiser with its full-precision layers in place.
        traced: The trace of the denoiser.
        plan: The bits of every layer.
        ranges: The `<layer>.input_scale` and `<layer>.input_zero_point` of every planned input.
        calls: The `(args, kwargs)` of the denoiser's calls.
        seed: The seed of the random directions.

    Returns:
        The error of every layer with a quantized input, by its name, and the multiplications of all layers per row.
    """
    generator = torch.Generator().manual_seed(seed)
    watch = _Watch(traced, plan, ranges)
    energies: list[Tensor] = []  # per call, with shape `(layers,)`
    for args, kwargs in calls:
        with watch.inputs() as seen, torch.enable_grad():
            prediction = prediction_of(denoiser(*args, **kwargs)).float()
            direction = torch.randn(prediction.shape, generator=generator).to(prediction.device)
            gradients = torch.autograd.grad(
                (prediction * direction).sum(), [seen[name][0] for name in watch.names], allow_unused=True
            )
        rows = len(prediction)
        changes = []
        for name, gradient in zip(watch.names, gradients, strict=True):
            product = torch.zeros(rows) if gradient is None else _row_sums(gradient * seen[name][1], rows)
            changes.append(product.detach().double().square().sum().cpu())
        energies.append(torch.stack(changes))
    together = torch.stack(energies, dim=1)  # [layers, calls]
    of_energy = together.sum(dim=1) / together.sum().clamp_min(_TINY)
    of_call = (together / together.sum(dim=0).clamp_min(_TINY)).mean(dim=1)
    harms = ((of_energy + of_call) / 2).tolist()
    products = {name: count / rows for name, count in watch.products.items()}  # those of the last call
    errors = {name: InputHarm(harm, products[name]) for name, harm in zip(watch.names, harms, strict=True)}
    return errors, sum(products.values())


def _row_sums(values: Tensor, rows: int) -> Tensor:
    """Returns the sum of each row's elements, `(rows,)`; the sum of an input that all rows share is divided equally."""
    if values.shape[0] % rows:
        return (values.sum() / rows).expand(rows)
    return values.reshape(rows, -1).sum(dim=1)


class _Watch:
    """Records the inputs of planned layers and their rounding errors, and counts the multiplications of each layer's
    last call.
    """

    def __init__(self, traced: Trace, plan: QuantizationPlan, ranges: Mapping[str, Tensor]) -> None:
        self.layers = {layer.name: layer.module for layer in traced.layers}
        self.plans = {
            name: layer.model_copy(update={"transform": None})
            for name, layer in plan.layers.items()
            if layer.input_grid is not None
        }
        self.names, self.ranges = list(self.plans), ranges
        self.products: dict[str, int] = {}

    @contextmanager
    def inputs(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Records each layer's input and its rounding error in the layer's last call while entered; yields them."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with Hooks() as hooks:
            for name, module in self.layers.items():
                hooks.after(module, self._count(name))
                if name in self.plans:
                    hooks.before(module, self._record(name, seen))
            yield seen

    def rounding_error(self, name: str, x: Tensor) -> Tensor:
        """Returns x_hat - x, the rounding error of a layer's input, in the shape of `x`."""
        plan, operation = self.plans[name], Operation.of(self.layers[name])
        errors = []
        for part, piece in zip(plan.part_names(name), plan.split(x, operation.channel_dim), strict=True):
            quantizer = input_quantizer(part, plan, operation, self.ranges)
            assert quantizer is not None
            errors.append(quantizer.to(x.device).fake_quantize(piece) - piece)
        return torch.cat(errors, operation.channel_dim)

    def _record(self, name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            watched = args[0] + 0  # a new tensor, whose gradient comes from this layer alone
            if not watched.requires_grad:
                watched.requires_grad_(True)
            with torch.no_grad():
                seen[name] = watched, self.rounding_error(name, watched)
            return watched, *args[1:]

        return hook

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = module.get_parameter("weight")
            self.products[name] = output.numel() * weight[0].numel()

        return hook
