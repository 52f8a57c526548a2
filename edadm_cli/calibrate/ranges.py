"""Before anything is learned: scales of all weights, and ranges of all layer inputs and attention operands, from one
pass of the full-precision network over the calibration set.

References:
    EDA-DM, arXiv 2401.04585, section 4.1; ranges of batches are merged by an exponential moving average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.units import Trace
from edadm_cli.quant.attention import OPERANDS, AttentionProducts, operand_grid
from edadm_cli.quant.network import set_processor
from edadm_cli.quant.plan import AttentionPlan, LayerPlan, QuantizationPlan
from edadm_cli.quant.search import Range, activation_range, symmetric_scale, weight_scales
from edadm_cli.recipe import RangeRecipe


def part_names(name: str, plan: LayerPlan) -> list[str]:
    """Names of the quantizers of a layer: its own, or one for each channel part."""
    if plan.channel_parts is None:
        return [name]
    return [f"{name}.part{index}" for index in range(len(plan.channel_parts))]


def split_channels(tensor: Tensor, plan: LayerPlan, dim: int) -> list[Tensor]:
    """A weight (`dim` 1) or an input cut into the layer's channel parts."""
    return [tensor] if plan.channel_parts is None else list(tensor.split(plan.channel_parts, dim=dim))


def search_ranges(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Initial quantization parameters without the codes: `<layer>.weight_scale`, `.input_scale`,
    `.input_zero_point`, `<attention>.{q,k,v,p}_scale`.

    Args:
        denoiser: With its full-precision layers in place.
        traced: Its trace.
        plan: Bits of every layer.
        recipe: How ranges are found.
        calls: `(args, kwargs)` of the denoiser, over the calibration set.
        advance: Told of every call that is done.

    Raises:
        InputError: A weight or an activation is not finite.
    """
    scales = search_weight_scales(traced, plan, recipe)
    return scales | search_activation_ranges(denoiser, traced, plan, recipe, calls, advance)


def search_weight_scales(traced: Trace, plan: QuantizationPlan, recipe: RangeRecipe) -> dict[str, Tensor]:
    """The part of `search_ranges` that needs no call: `<layer>.weight_scale` of every planned layer.

    Raises:
        InputError: A weight is not finite.
    """
    params = {}
    for layer in traced.layers:
        layer_plan = plan.layers.get(layer.name)
        if layer_plan is None:
            continue
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        _require_finite(weight, f"the weight of '{layer.name}'")
        for part, piece in zip(
            part_names(layer.name, layer_plan), split_channels(weight.detach(), layer_plan, 1), strict=True
        ):
            params[f"{part}.weight_scale"] = weight_scales(piece, layer_plan.weight_grid, recipe).cpu()
    return params


def search_activation_ranges(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """The part of `search_ranges` that the calls decide; `denoiser` may be a part of one, with its own trace and plan.

    Raises:
        InputError: An activation is not finite.
    """
    params: dict[str, Tensor] = {}
    observed = _Observations(recipe)
    with ExitStack() as stack:
        for layer in traced.layers:
            if layer.name in plan.layers and plan.layers[layer.name].input_grid is not None:
                stack.enter_context(_observed_layer(layer.name, layer.module, plan.layers[layer.name], observed))
        for name, attention_plan in plan.attentions.items():
            stack.enter_context(_observed_attention(traced.attentions[name], name, attention_plan, observed))
        with torch.no_grad():
            for args, kwargs in calls:
                denoiser(*args, **kwargs)
                advance(1)
    for name, layer_plan in plan.layers.items():
        if layer_plan.input_grid is None:
            continue
        for part in part_names(name, layer_plan):
            scale, zero_point = observed.ranges[part].parameters(layer_plan.input_grid)
            params[f"{part}.input_scale"] = torch.tensor(scale)
            params[f"{part}.input_zero_point"] = torch.tensor(zero_point, dtype=torch.int32)
    for name in plan.attentions:
        for operand in OPERANDS:
            params[f"{name}.{operand}_scale"] = torch.tensor(observed.scales[f"{name}.{operand}"])
    return params


class _Observations:
    """Merged ranges (layer inputs, probabilities) and scales (queries, keys, values) over batches."""

    def __init__(self, recipe: RangeRecipe) -> None:
        self.recipe = recipe
        self.ranges: dict[str, Range] = {}
        self.scales: dict[str, float] = {}

    def add_range(self, name: str, found: Range) -> None:
        old = self.ranges.get(name)
        self.ranges[name] = found if old is None else old.merge(found, self.recipe.ema_decay)

    def add_scale(self, name: str, found: float) -> None:
        old, decay = self.scales.get(name), self.recipe.ema_decay
        self.scales[name] = found if old is None else decay * old + (1 - decay) * found


@contextmanager
def _observed_layer(name: str, module: nn.Module, plan: LayerPlan, observed: _Observations) -> Iterator[None]:
    grid, parts = plan.input_grid, part_names(name, plan)
    assert grid is not None
    dim = 1 if isinstance(module, nn.Conv2d) else -1

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        _require_finite(inputs[0], f"the input of '{name}'")
        for part, piece in zip(parts, split_channels(inputs[0], plan, dim), strict=True):
            observed.add_range(part, activation_range(piece, grid, observed.recipe))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _ObservedAttention(AttentionProducts):
    def __init__(self, name: str, plan: AttentionPlan, observed: _Observations) -> None:
        super().__init__()
        self.name, self.plan, self.observed = name, plan, observed

    def touch(self, operand: str, tensor: Tensor) -> Tensor:
        grid, recipe = operand_grid(self.plan, operand), self.observed.recipe
        if operand == "p":
            scale = activation_range(tensor, grid, recipe).parameters(grid)[0]
        else:
            scale = symmetric_scale(tensor, grid, recipe)
        self.observed.add_scale(f"{self.name}.{operand}", scale)
        return tensor


@contextmanager
def _observed_attention(module: nn.Module, name: str, plan: AttentionPlan, observed: _Observations) -> Iterator[None]:
    processor = module.processor
    set_processor(module, _ObservedAttention(name, plan, observed))
    try:
        yield
    finally:
        set_processor(module, processor)


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"There are values in {what} that are not finite; the model or its samples are broken.")
