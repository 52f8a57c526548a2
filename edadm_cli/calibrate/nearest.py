"""Quantizes without learning: weights are rounded to nearest on their initial grids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.calibrate.transforming import folded
from edadm_cli.config import BitWidth
from edadm_cli.models.families import Call
from edadm_cli.models.units import trace
from edadm_cli.quant.groups import per_weight
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.recipe import Recipe


def nearest_codes(weight: Tensor, scale: Tensor, plan: LayerPlan, multipliers: Tensor | None = None) -> Tensor:
    """Returns the integers of `weight`, rounded to nearest, as int8 in its shape.

    Args:
        weight: The weight, with shape `(C_out, ...)`.
        scale: The scale of each output channel.
        plan: The bits.
        multipliers: The multiplier of each group, where there are groups; an integer is then a code times a multiplier.
    """
    grid = plan.weight_grid
    per_channel = scale.reshape(-1, *[1] * (weight.dim() - 1))
    if multipliers is None or plan.group_size is None:
        return (weight / per_channel).round().clamp(grid.quant_min, grid.quant_max).to(torch.int8)
    factors = per_weight(multipliers.to(weight.device), tuple(weight.shape), plan.group_size)
    codes = (weight / (per_channel * factors)).round().clamp(grid.quant_min, grid.quant_max)
    return (codes * factors).to(torch.int8)


def nearest_params(
    weight_of: Callable[[str], Tensor], plan: QuantizationPlan, ranges: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns quantization parameters: the given ranges, and codes of weights that are rounded to nearest.

    Args:
        weight_of: Returns the full-precision weight of a layer by name.
        plan: The bits of every layer.
        ranges: The parameters that `search_ranges` returns.
    """
    params = dict(ranges)
    for name, layer_plan in plan.layers.items():
        weight = weight_of(name).detach()
        for part, piece in zip(layer_plan.part_names(name), layer_plan.split(weight), strict=True):
            rounded = folded(piece, part, layer_plan, ranges)
            scale = ranges[f"{part}.weight_scale"].to(weight.device)
            multipliers = ranges.get(f"{part}.weight_multiplier")
            params[f"{part}.weight_int"] = nearest_codes(rounded, scale, layer_plan, multipliers).cpu()
    return params


def nearest_params_of(
    layers: Collection[str],
    weight_of: Callable[[str], Tensor],
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Returns codes and ranges of some layers, as `nearest_params` does for all layers."""
    part = QuantizationPlan(layers={name: plan.layers[name] for name in layers})
    prefixes = tuple(f"{name}." for layer in layers for name in part.layers[layer].part_names(layer))
    return nearest_params(weight_of, part, {key: value for key, value in ranges.items() if key.startswith(prefixes)})


def quantize_to_nearest(denoiser: nn.Module, recipe: Recipe, bits: BitWidth, calls: Iterable[Call]) -> QuantizationPlan:
    """Quantizes a denoiser in place from a few calls, without learning anything: for speed, not for quality.

    Args:
        denoiser: The full-precision denoiser in float32.
        recipe: Decides which layers are quantized and how ranges are searched; its learning is not used.
        bits: The bits of weights and activations.
        calls: Arguments of the calls whose activations give the ranges. A recipe that does not pool its batches
            (`ranges.pooled`), such as `rtn`, gives the last calls most weight (`ranges.ema_decay`). Pass such a recipe
            calls in an order that mixes the steps, or use a recipe that pools, such as `quick`.

    Returns:
        The plan of the layers that were quantized.
    """
    plan, ranges = nearest_ranges(denoiser, recipe, bits, calls)
    round_to_nearest(denoiser, plan, ranges)
    return plan


def nearest_ranges(
    denoiser: nn.Module, recipe: Recipe, bits: BitWidth, calls: Iterable[Call]
) -> tuple[QuantizationPlan, dict[str, Tensor]]:
    """Returns what `round_to_nearest` needs; see `quantize_to_nearest` for the arguments. The denoiser is not changed.

    Returns:
        The plan of the layers, and the parameters that `search_ranges` returns. They are small, because codes of
        weights are not among them.
    """
    calls = list(calls)
    traced = trace(denoiser, *calls[0])
    plan = plan_network(traced, recipe, bits)
    return plan, search_ranges(denoiser, traced, plan, recipe.ranges, calls, transforms=recipe.transforms)


@torch.no_grad()
def round_to_nearest(denoiser: nn.Module, plan: QuantizationPlan, ranges: Mapping[str, Tensor]) -> None:
    """Quantizes a full-precision denoiser in place with a plan and ranges of `nearest_ranges`, without a call of it."""
    params = nearest_params(lambda name: denoiser.get_submodule(name).get_parameter("weight"), plan, ranges)
    quantize_network(denoiser, plan)
    load_quant_params(denoiser, params)
