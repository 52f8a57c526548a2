"""Searches the scales of all weights, and the ranges of all layer inputs and attention operands.

The ranges come from one pass of the full-precision network over the calibration set, before anything is learned.

References:
    EDA-DM, arXiv 2401.04585, section 4.1; its authors merge ranges of batches by an exponential moving average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.statistics import channel_statistics
from edadm_cli.calibrate.transforming import calibrate_transforms, folded, transform_tensors, transformed
from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace
from edadm_cli.quant.attention import OPERANDS, AttentionProducts, operand_grid
from edadm_cli.quant.grid import Grid
from edadm_cli.quant.groups import search_groups
from edadm_cli.quant.histogram import Histogram
from edadm_cli.quant.network import set_processor
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import AttentionPlan, LayerPlan, QuantizationPlan
from edadm_cli.quant.search import Range, activation_range, input_energy, symmetric_scale, weight_scales
from edadm_cli.quant.transforms import ChannelStatistics, transform_named
from edadm_cli.recipe import RangeRecipe, TransformRule


def search_ranges(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    calls: Iterable[Call],
    advance: Callable[[int], None] = lambda _: None,
    transforms: Sequence[TransformRule] = (),
) -> dict[str, Tensor]:
    """Returns the initial quantization parameters, without the codes of weights.

    They are `<layer>.weight_scale`, `.weight_multiplier` where weights have groups, `.input_scale` and
    `.input_zero_point`, the tensors of the transforms, and `<attention>.{q,k,v,p}_scale`.

    Args:
        denoiser: The denoiser at full precision.
        traced: Its trace.
        plan: The bits and transforms of every layer.
        recipe: The recipe's ranges.
        calls: `(args, kwargs)` of the denoiser over the calibration set; iterated twice if channels are observed.
        advance: Progress callback, called after every call of the last pass.
        transforms: The rules of the recipe, for the options of the transforms that the plan names.

    Raises:
        InputError: A weight or an activation is not finite.
        UsageError: A transform does not have an option that the recipe gives it.
        MachineError: A transform of another package returned other tensors than it names.
    """
    observed = {name for name, layer in plan.layers.items() if layer.transform is not None}
    if recipe.weight == "output-error":
        observed |= plan.layers.keys()
    statistics = channel_statistics(denoiser, traced, plan, observed, calls) if observed else {}
    params = calibrate_transforms(traced, plan, transforms, statistics)
    params |= search_weight_scales(traced, plan, recipe, params, statistics)
    return params | search_activation_ranges(denoiser, traced, plan, recipe, calls, advance, params)


def search_weight_scales(
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    params: Mapping[str, Tensor] | None = None,
    statistics: Mapping[str, ChannelStatistics] | None = None,
) -> dict[str, Tensor]:
    """Returns the part of `search_ranges` that needs no further call: `<layer>.weight_scale` of every planned layer.

    Layers with groups also have a `<layer>.weight_multiplier`.

    Args:
        traced: The trace of the denoiser.
        plan: Bits of every layer, and their transforms.
        recipe: How ranges are found.
        params: Tensors of the transforms.
        statistics: The statistics of the inputs, for a search by errors of outputs; without them, by errors of weights.

    Raises:
        InputError: A weight is not finite.
    """
    params, statistics = params or {}, statistics or {}
    scales: dict[str, Tensor] = {}
    for layer in traced.layers:
        layer_plan = plan.layers.get(layer.name)
        if layer_plan is None:
            continue
        weight = layer.weight
        _require_finite(weight, f"the weight of '{layer.name}'")
        for part, piece in zip(layer_plan.part_names(layer.name), layer_plan.split(weight), strict=True):
            energy = None
            if recipe.weight == "output-error" and part in statistics:
                energy = _energy(part, layer_plan, params, statistics[part])
                energy = input_energy(energy, piece, Operation.of(layer.module).groups)
            scales |= _scales_of_part(part, folded(piece, part, layer_plan, params), layer_plan, recipe, energy)
    return scales


def _scales_of_part(
    part: str, weight: Tensor, plan: LayerPlan, recipe: RangeRecipe, energy: Tensor | None
) -> dict[str, Tensor]:
    """Returns the scales of a weight under the names of the artifact, and the multipliers of its groups, if any."""
    if plan.group_size is None:
        return {f"{part}.weight_scale": weight_scales(weight, plan.weight_grid, recipe, energy).cpu()}
    scale, multipliers = search_groups(weight, plan.weight_grid, plan.group_size, recipe, energy)
    return {f"{part}.weight_scale": scale.cpu(), f"{part}.weight_multiplier": multipliers.cpu()}


def _energy(part: str, plan: LayerPlan, params: Mapping[str, Tensor], statistics: ChannelStatistics) -> Tensor:
    """Returns E[x_c^2] of the input that the weight multiplies, with shape `(C_in,)`."""
    if plan.transform is None:
        return statistics.mean_square
    transform = transform_named(plan.transform)
    return transform.mean_square(statistics, transform_tensors(transform, part, params))


def search_activation_ranges(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    recipe: RangeRecipe,
    calls: Iterable[Call],
    advance: Callable[[int], None] = lambda _: None,
    transforms: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Returns the part of `search_ranges` that depends on the calls.

    `denoiser` may be a part of a denoiser with its own trace and plan. `transforms` are the tensors of the planned
    transforms; without them, inputs are not transformed.

    Raises:
        InputError: An activation is not finite.
    """
    observed = _Observations(recipe)
    with ExitStack() as stack:
        for layer in traced.layers:
            if layer.name in plan.layers and plan.layers[layer.name].input_grid is not None:
                layer_plan = plan.layers[layer.name]
                stack.enter_context(_observed_layer(layer.name, layer.module, layer_plan, observed, transforms or {}))
        for name, attention_plan in plan.attentions.items():
            stack.enter_context(_observed_attention(traced.attentions[name], name, attention_plan, observed))
        with torch.no_grad():
            for args, kwargs in calls:
                denoiser(*args, **kwargs)
                observed.end_batch()
                advance(1)
    ranges, params = observed.ranges(), dict[str, Tensor]()
    for name, layer_plan in plan.layers.items():
        if layer_plan.input_grid is None:
            continue
        for part in layer_plan.part_names(name):
            scale, zero_point = Range(*ranges[part]).parameters(layer_plan.input_grid)
            params[f"{part}.input_scale"] = torch.tensor(scale)
            params[f"{part}.input_zero_point"] = torch.tensor(zero_point, dtype=torch.int32)
    for name, attention_plan in plan.attentions.items():
        for operand in OPERANDS:
            grid, (low, high) = operand_grid(attention_plan, operand), ranges[f"{name}.{operand}"]
            scale = high / grid.quant_max if grid.signed else Range(low, high).parameters(grid)[0]
            params[f"{name}.{operand}_scale"] = torch.tensor(scale)
    return params


class _Observations:
    """Values of layer inputs and attention operands, and the ranges that are searched from them.

    Pooled, all batches are counted in one histogram per tensor, which is searched once. Otherwise each batch is
    searched by itself, and its ranges are merged into those of the earlier ones by an exponential moving average.

    Args:
        recipe: How ranges are found.
    """

    def __init__(self, recipe: RangeRecipe) -> None:
        self.recipe = recipe
        self._histograms: dict[str, Histogram] = {}
        self._grids: dict[str, tuple[str, Grid]] = {}
        self._merged: dict[str, Tensor] = {}

    def add(self, name: str, what: str, grid: Grid, x: Tensor) -> None:
        """Counts the values of a batch.

        Args:
            name: The tensor's name.
            what: What it is, for an error.
            grid: Its codes: signed ones are symmetric about zero.
            x: Its values.
        """
        if name not in self._histograms:
            self._histograms[name] = Histogram(x.device)
            self._grids[name] = what, grid
        self._histograms[name].add(x)

    def end_batch(self) -> None:
        """Closes a batch.

        Raises:
            InputError: A value is not finite.
        """
        if self._histograms:
            finite = torch.stack([histogram.is_finite for histogram in self._histograms.values()]).tolist()
            for name, is_finite in zip(self._histograms, finite, strict=True):
                if not is_finite:
                    raise InputError(_not_finite(self._grids[name][0]))
        if not self.recipe.pooled:
            self._search()

    def ranges(self) -> dict[str, list[float]]:
        """Returns low and high of every tensor."""
        self._search()
        if not self._merged:
            return {}
        return dict(zip(self._merged, torch.stack([*self._merged.values()]).tolist(), strict=True))

    def _search(self) -> None:
        for name, histogram in self._histograms.items():
            _, grid = self._grids[name]
            if grid.signed:
                high = symmetric_scale(histogram, grid, self.recipe) * grid.quant_max
                limits = torch.stack((-high, high))
            else:
                limits = activation_range(histogram, grid, self.recipe)
            old, decay = self._merged.get(name), self.recipe.ema_decay
            self._merged[name] = limits if old is None else decay * old + (1 - decay) * limits
        self._histograms.clear()


@contextmanager
def _observed_layer(
    name: str, module: nn.Module, plan: LayerPlan, observed: _Observations, transforms: Mapping[str, Tensor]
) -> Iterator[None]:
    grid, parts, dim = plan.input_grid, plan.part_names(name), Operation.of(module).channel_dim
    assert grid is not None
    transform = transform_named(plan.transform) if plan.transform is not None and transforms else None
    moved: dict[str, dict[str, Tensor]] = {}  # the transform's tensors by part, on the device of the input

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        for part, piece in zip(parts, plan.split(inputs[0], dim), strict=True):
            if transform is not None:
                if part not in moved:
                    tensors = transform_tensors(transform, part, transforms)
                    moved[part] = {key: tensor.to(piece.device) for key, tensor in tensors.items()}
                piece = transformed(piece, transform, moved[part], dim)
            observed.add(part, f"the input of '{name}'", grid, piece)

    with Hooks() as hooks:
        hooks.before(module, hook)
        yield


class _ObservedAttention(AttentionProducts):
    def __init__(self, name: str, plan: AttentionPlan, observed: _Observations) -> None:
        super().__init__()
        self.name, self.plan, self.observed = name, plan, observed

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        what = f"the operand {operand} of '{self.name}'"
        self.observed.add(f"{self.name}.{operand}", what, operand_grid(self.plan, operand), tensor)
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
        raise InputError(_not_finite(what))


def _not_finite(what: str) -> str:
    return f"There are values in {what} that are not finite; the model or its samples are broken."
