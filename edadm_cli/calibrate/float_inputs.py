r"""Which layers keep their inputs in floating point: those whose rounding changes the prediction most.

Rounding the input x_l of layer l changes the prediction by J_l d_l to first order, with d_l = x_hat_l - x_l. For a
random v with independent elements of variance 1,

    E[(v . J_l d_l)^2] = |J_l d_l|^2,   v . J_l d_l = g_l . d_l,   g_l = the gradient of v . prediction in x_l,

so that one backward pass per batch of calls estimates the errors that all layers cause. The layers that are left in
floating point share a budget of multiplications, and those with the largest error per multiplication come first.

References:
    Hutchinson's estimator, doi 10.1080/03610919008812866 (random projections of a Jacobian's columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.ranges import search_activation_ranges
from edadm_cli.hooks import Hooks
from edadm_cli.models.units import Trace
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.recipe import RangeRecipe

_SMALLEST_HARM = 0.01
_TINY = 1e-30


@dataclass(frozen=True)
class InputError:
    """What rounding the input of one layer does.

    Attributes:
        harm: Its share of the error that rounding all inputs causes, from 0 to 1: the mean of its share of the error's
            energy over all calls, which those with the largest errors decide, and of its mean share over the calls.
        products: Multiplications of the layer per row.
    """

    harm: float
    products: float


def plan_float_inputs(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    range_calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    seed: int,
) -> QuantizationPlan:
    """Returns the plan with those inputs in floating point on which the recipe's share of products is best spent.

    Args:
        denoiser: With its full-precision layers in place.
        traced: Its trace.
        plan: Bits of every layer.
        recipe: How ranges are found, and the share.
        range_calls: `(args, kwargs)` of the denoiser, from which ranges are searched.
        calls: Calls with a few rows each, samples of similar steps together.
        seed: Seed of the random directions.
    """
    ranges = search_activation_ranges(denoiser, traced, plan, recipe, range_calls)
    errors, products = measure_input_errors(denoiser, traced, plan, ranges, calls, seed)
    changes = {"activation_bits": None, "transform": None}
    chosen = choose_float_inputs(errors, products, recipe.float_input_share)
    return plan.model_copy(
        update={"layers": plan.layers | {name: plan.layers[name].model_copy(update=changes) for name in chosen}}
    )


def choose_float_inputs(errors: Mapping[str, InputError], total_products: float, share: float) -> list[str]:
    """Returns the layers whose inputs stay in floating point, at most `share` of `total_products` together.

    Layers with the largest harm per multiplication come first; harms below 1% are not worth a layer.
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
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    seed: int,
) -> tuple[dict[str, InputError], float]:
    """Estimates what rounding each input does to the prediction.

    Args:
        denoiser: With its full-precision layers in place.
        traced: Its trace.
        plan: Bits of every layer.
        ranges: `<layer>.input_scale` and `.input_zero_point` of every planned input.
        calls: `(args, kwargs)` of the denoiser.
        seed: Seed of the random directions.

    Returns:
        The error of every layer with a quantized input, by its name, and the multiplications of all layers per row.
    """
    generator = torch.Generator().manual_seed(seed)
    watch = _Watch(traced, plan, ranges)
    energies: list[Tensor] = []  # per call, with shape `(layers,)`
    for args, kwargs in calls:
        with watch.inputs() as seen, torch.enable_grad():
            prediction = _prediction(denoiser(*args, **kwargs)).float()
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
    errors = {n: InputError(harm, watch.products[n]) for n, harm in zip(watch.names, harms, strict=True)}
    return errors, sum(watch.products.values())


def _prediction(output: Any) -> Tensor:
    prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _row_sums(values: Tensor, rows: int) -> Tensor:
    """Returns the sum of each row's elements; an input that all rows share counts in equal parts for each of them."""
    if values.shape[0] % rows:
        return (values.sum() / rows).expand(rows)
    return values.reshape(rows, -1).sum(dim=1)


class _Watch:
    """Sees the inputs of planned layers, and what rounding does to them."""

    def __init__(self, traced: Trace, plan: QuantizationPlan, ranges: Mapping[str, Tensor]) -> None:
        self.layers = {layer.name: layer.module for layer in traced.layers}
        self.plans = {name: layer for name, layer in plan.layers.items() if layer.input_grid is not None}
        self.names, self.ranges = list(self.plans), ranges
        self.products: dict[str, float] = {}

    def inputs(self) -> _Seen:
        """Returns a context that records the input of each layer and its rounding error, both of the last call."""
        return _Seen(self)

    def rounding_error(self, name: str, x: Tensor) -> Tensor:
        """Returns x_hat - x."""
        plan, dim = self.plans[name], Operation.of(self.layers[name]).channel_dim
        pieces = zip(plan.part_names(name), plan.split(x, dim), strict=True)
        return torch.cat(
            [self._quantizer(plan, part, dim, x).fake_quantize(piece) - piece for part, piece in pieces], dim
        )

    def _quantizer(self, plan: LayerPlan, part: str, dim: int, like: Tensor) -> InputQuantizer:
        assert plan.input_grid is not None
        scale, zero_point = (
            self.ranges[f"{part}.{key}"].to(like.device) for key in ("input_scale", "input_zero_point")
        )
        return InputQuantizer(plan.input_grid, scale, zero_point, dim)


class _Seen(Hooks):
    """The hooks of one call."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in watch.layers.items():
            self.after(module, self._count(name))
            if name in watch.plans:
                self.before(module, self._record(name))

    def __enter__(self) -> Any:
        super().__enter__()
        return self.seen

    def _record(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            watched = args[0] + 0  # a tensor of its own, whose gradient is this layer's alone
            if not watched.requires_grad:
                watched.requires_grad_(True)
            with torch.no_grad():
                self.seen[name] = watched, self.watch.rounding_error(name, watched)
            return watched, *args[1:]

        return hook

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = module.get_parameter("weight")
            positions = output.numel() / weight.shape[0]
            self.watch.products[name] = positions * weight.numel() / max(1, len(output))

        return hook
