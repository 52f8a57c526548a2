r"""Chooses the bits of each layer within a budget, by an integer program.

    minimise    sum_l sum_b E_{l,b} x_{l,b}
    subject to  sum_b x_{l,b} = 1 for every layer l,   sum_l sum_b C_{l,b} x_{l,b} <= B,   x in {0, 1}

where E_{l,b} is the error of layer l at b bits, C_{l,b} the cost in bits of its weights (b per weight, or their size on
disk, with the multipliers of groups), and B the budget in bits. The errors of different layers are assumed to add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from edadm_cli.artifacts import LayerSensitivity, Sensitivity
from edadm_cli.bits import LARGEST_GROUPED_BITS
from edadm_cli.calibrate.planning import layer_rule, plan_network
from edadm_cli.config import BitWidth
from edadm_cli.errors import UsageError
from edadm_cli.models.stored import is_stored, num_weights, total_parameters
from edadm_cli.models.units import Trace, TracedLayer
from edadm_cli.quant.groups import num_groups
from edadm_cli.quant.operation import weight_shape
from edadm_cli.quant.plan import LayerPlan, name_within
from edadm_cli.quant.storage import MULTIPLIER_BITS, packed_bytes, stored_bits
from edadm_cli.quant.transforms import transform_named
from edadm_cli.recipe import Recipe

_FLOAT_BYTES, _HEADER_BYTES = 4, 140  # of a number, and of a tensor's entry in the header of a safetensors file
_PART_TENSORS = 4  # codes, scale, input scale and zero-point


def assign_bits(
    errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], budget_bits: float
) -> dict[str, int]:
    """Returns the number of bits of each layer.

    Args:
        errors: Maps a layer and a number of bits to the error. Layers may have different candidates.
        costs: Maps them to C_{l,b}, what the weights cost in bits.
        budget_bits: B, the bits of all weights together.

    Returns:
        A map from layers to numbers of bits.

    Raises:
        UsageError: The solver has found no choice within the budget.
    """
    columns = [(name, bits) for name, widths in errors.items() for bits in sorted(widths)]
    cost = np.array([errors[name][bits] for name, bits in columns])
    size = np.array([costs[name][bits] for name, bits in columns])
    rows = {name: row for row, name in enumerate(errors)}
    choose_one = np.zeros((len(rows), len(columns)))
    for column, (name, _) in enumerate(columns):
        choose_one[rows[name], column] = 1
    scale = max(cost.max(), 1e-300)  # the solver's tolerances are absolute
    solution = milp(
        cost / scale,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choose_one, 1, 1),
            LinearConstraint(size / size.max(), -np.inf, budget_bits / size.max()),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": 60.0},
    )
    if solution.x is None:
        raise UsageError(f"No assignment of bits was found within a minute: {solution.message}")
    return {name: bits for (name, bits), chosen in zip(columns, solution.x, strict=True) if chosen > 0.5}


@dataclass(frozen=True)
class LayerCosts:
    """What the quantized layers of a denoiser cost. Names are those within the pipeline; see `name_within`.

    Attributes:
        errors: Maps a layer and a number of bits to the error.
        costs: Maps them to the bits of the layer's weights with their multipliers; on disk, if the budget is a size.
        num_weights: The number of weights of all layers.
        bytes_beside: The bytes of the quantized denoiser's file besides these.
    """

    errors: Mapping[str, Mapping[int, float]]
    costs: Mapping[str, Mapping[int, float]]
    num_weights: int
    bytes_beside: int


def layer_costs(
    sensitivity: Sensitivity, bits: BitWidth, recipe: Recipe, denoiser: nn.Module, traced: Trace, place: str = ""
) -> LayerCosts:
    """Returns what the layers of a denoiser cost.

    Layers to which a rule of the recipe gives weight bits keep them, and are part of the budget.

    Args:
        sensitivity: The measured errors.
        bits: The bit width, with an average or a size.
        recipe: The recipe, which decides what is quantized.
        denoiser: The denoiser in full precision.
        traced: Its trace.
        place: Its folder within an artifact; `""` of the first denoiser.

    Raises:
        UsageError: A layer that the recipe quantizes was not measured, or not in groups of this size.
    """
    planned = plan_network(traced, recipe, bits).layers
    errors = _errors(sensitivity, recipe, planned, bits, place)
    layers = {name_within(place, layer.name): layer for layer in traced.layers if layer.name in planned}
    return LayerCosts(
        errors,
        {name: _weight_costs(layer, planned[layer.name], bits, errors[name]) for name, layer in layers.items()},
        sum(num_weights(layer.module) for layer in layers.values()),
        bytes_beside_codes(denoiser, traced, planned),
    )


def spend_budget(bits: BitWidth, denoisers: Sequence[LayerCosts]) -> dict[str, int]:
    """Returns the number of weight bits per layer for an average per weight, or for a size of the quantized denoisers.

    The layers of all denoisers share one budget: the average is over all of them, and so is the size.

    Args:
        bits: The bit width, with an average or a size.
        denoisers: The costs of the layers of each denoiser.

    Raises:
        UsageError: The budget is too small.
    """
    errors = {name: widths for each in denoisers for name, widths in each.errors.items()}
    costs = {name: widths for each in denoisers for name, widths in each.costs.items()}
    fewest = sum(min(widths.values()) for widths in costs.values())
    if bits.size_mib is None:
        assert bits.average is not None
        total = sum(each.num_weights for each in denoisers)
        if bits.average * total < fewest:
            raise UsageError(
                f"An average of {bits.average:g} bits per weight is too small: the fewest that were measured are"
                f" {fewest / total:.3g}.",
                hint="a larger average in --bits",
            )
        return assign_bits(errors, costs, bits.average * total)
    beside = sum(each.bytes_beside for each in denoisers)
    smallest = (beside + fewest / 8) / 2**20
    if bits.size_mib < smallest:
        raise UsageError(
            f"A size of {bits.size_mib:g} MiB is too small: with the fewest bits that were measured and"
            f" {beside / 2**20:.3f} MiB of scales and float tensors the denoiser takes {smallest:.3f} MiB.",
            hint="a larger size in --bits",
        )
    return assign_bits(errors, costs, 8 * (bits.size_mib * 2**20 - beside))


def _weight_costs(layer: TracedLayer, plan: LayerPlan, bits: BitWidth, widths: Iterable[int]) -> dict[int, float]:
    """Returns the bits that the weights of a layer take at several widths, with the multipliers of groups."""
    outputs, *rest = weight_shape(layer.module)
    inputs, area = rest[0], math.prod(rest[1:])
    rows = [part * area for part in plan.channel_parts or (inputs,)]  # weights per output channel, of each part
    on_disk, size = bits.size_mib is not None, bits.group_size
    costs: dict[int, float] = {}
    for width in widths:
        costs[width] = num_weights(layer.module) * (stored_bits(width) if on_disk else width)
        if size is None or width > LARGEST_GROUPED_BITS:
            continue
        for groups in (num_groups(row, size) for row in rows):
            multipliers = 8 * packed_bytes(groups, MULTIPLIER_BITS) if on_disk else MULTIPLIER_BITS * groups
            costs[width] += outputs * multipliers + (8 * _HEADER_BYTES if on_disk else 0)
    return costs


def _errors(
    sensitivity: Sensitivity, recipe: Recipe, planned: Mapping[str, LayerPlan], bits: BitWidth, place: str
) -> dict[str, dict[int, float]]:
    """Returns the candidates of each planned layer with their errors; those of the recipe's rules have no choice."""
    if bits.group_size not in (None, sensitivity.group_size):
        raise UsageError(
            f"The sensitivity of weights in groups of {bits.group_size} was not measured.",
            hint=f"edadm sensitivity --group-size {bits.group_size} --force",
        )
    measured = {layer.name: _candidates(layer, bits.group_size is not None) for layer in sensitivity.layers}
    errors: dict[str, dict[int, float]] = {}
    for name in planned:
        given, full_name = layer_rule(name, recipe).weight_bits, name_within(place, name)
        if given is None and full_name not in measured:
            raise UsageError(
                f"The recipe '{recipe.name}' quantizes the layer '{full_name}', whose sensitivity was not measured.",
                hint="edadm sensitivity --force with the same --recipe, or weight_bits for this layer in the recipe",
            )
        errors[full_name] = measured[full_name] if given is None else {given: 0.0}
    return errors


def _candidates(layer: LayerSensitivity, in_groups: bool) -> dict[int, float]:
    """Returns the errors of a layer's candidates; those of few bits have groups, or none of them has."""
    if not in_groups:
        return layer.weight_errors
    wide = {bits: error for bits, error in layer.weight_errors.items() if bits > LARGEST_GROUPED_BITS}
    return layer.group_errors | wide


def bytes_beside_codes(denoiser: nn.Module, traced: Trace, planned: Mapping[str, LayerPlan]) -> int:
    """Returns the bytes of a quantized denoiser's file besides the codes: float tensors, scales, and tensor names."""
    floats = total_parameters(denoiser)
    tensors = len(list(denoiser.parameters())) + sum(map(is_stored, denoiser.modules()))
    for layer in traced.layers:
        plan = planned.get(layer.name)
        if plan is None:
            continue
        outputs, inputs = weight_shape(layer.module)[:2]
        parts = len(plan.part_names(layer.name))
        of_transform = 0 if plan.transform is None else len(transform_named(plan.transform).tensors)
        floats += parts * (outputs + 2) + of_transform * inputs - num_weights(layer.module)
        tensors += parts * (_PART_TENSORS + of_transform) - 1  # the weight is no longer there
    return _FLOAT_BYTES * floats + _HEADER_BYTES * tensors
