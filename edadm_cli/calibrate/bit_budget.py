r"""Chooses the bits of each layer within a budget, by an integer program.

    minimise    sum_l sum_b E_{l,b} x_{l,b}
    subject to  sum_b x_{l,b} = 1 for every layer l,   sum_l sum_b n_l c_b x_{l,b} <= B,   x in {0, 1}

where E_{l,b} is the error of layer l at b bits, n_l its number of weights, c_b the cost in bits of a code of b bits (b
itself, or its size on disk), and B the budget in bits. The errors of different layers are assumed to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from edadm_cli.artifacts import Sensitivity
from edadm_cli.calibrate.planning import layer_rule, plan_network
from edadm_cli.config import BitWidth
from edadm_cli.errors import UsageError
from edadm_cli.models.stored import is_stored, num_weights, total_parameters
from edadm_cli.models.units import Trace
from edadm_cli.quant.operation import weight_shape
from edadm_cli.quant.packing import stored_bits
from edadm_cli.quant.plan import LayerPlan, name_within
from edadm_cli.quant.transforms import transform_named
from edadm_cli.recipe import Recipe

_FLOAT_BYTES, _HEADER_BYTES = 4, 140  # of a number, and of a tensor's entry in the header of a safetensors file
_PART_TENSORS = 4  # codes, scale, input scale and zero-point


def assign_bits(
    errors: Mapping[str, Mapping[int, float]],
    num_weights: Mapping[str, int],
    budget_bits: float,
    cost_of: Callable[[int], int] = int,
) -> dict[str, int]:
    """Returns the number of bits of each layer.

    Args:
        errors: Maps a layer and a number of bits to the error. Layers may have different candidates.
        num_weights: Maps a layer to its number of weights.
        budget_bits: B, the bits of all weights together.
        cost_of: Returns c_b, the cost in bits of a code of b bits.

    Returns:
        A map from layers to numbers of bits.

    Raises:
        UsageError: The budget is smaller than the cost of all layers at their fewest bits.
    """
    fewest = sum(num_weights[name] * min(map(cost_of, widths)) for name, widths in errors.items())
    if budget_bits < fewest:
        total = sum(num_weights[name] for name in errors)
        raise UsageError(
            f"A budget of {max(budget_bits, 0) / total:.3g} bits per weight is too small: the fewest that were measured"
            f" are {fewest / total:.3g}.",
            hint="a larger average or size in --bits",
        )
    columns = [(name, bits) for name, widths in errors.items() for bits in sorted(widths)]
    cost = np.array([errors[name][bits] for name, bits in columns])
    size = np.array([float(num_weights[name] * cost_of(bits)) for name, bits in columns])
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
        num_weights: Maps a layer to its number of weights.
        bytes_beside: The bytes of the quantized denoiser's file besides the codes.
    """

    errors: Mapping[str, Mapping[int, float]]
    num_weights: Mapping[str, int]
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
        UsageError: A layer that the recipe quantizes was not measured.
    """
    planned = plan_network(traced, recipe, bits).layers
    sizes = {layer.name: num_weights(layer.module) for layer in traced.layers if layer.name in planned}
    return LayerCosts(
        _errors(sensitivity, recipe, planned, place),
        {name_within(place, name): size for name, size in sizes.items()},
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
    sizes = {name: size for each in denoisers for name, size in each.num_weights.items()}
    if bits.size_mib is None:
        assert bits.average is not None
        return assign_bits(errors, sizes, bits.average * sum(sizes.values()))
    beside = sum(each.bytes_beside for each in denoisers)
    smallest = (
        beside + sum(sizes[name] * min(map(stored_bits, widths)) / 8 for name, widths in errors.items())
    ) / 2**20
    if bits.size_mib < smallest:
        raise UsageError(
            f"A size of {bits.size_mib:g} MiB is too small: with the fewest bits that were measured and"
            f" {beside / 2**20:.3f} MiB of scales and float tensors the denoiser takes {smallest:.3f} MiB.",
            hint="a larger size in --bits",
        )
    return assign_bits(errors, sizes, 8 * (bits.size_mib * 2**20 - beside), stored_bits)


def _errors(
    sensitivity: Sensitivity, recipe: Recipe, planned: Mapping[str, LayerPlan], place: str
) -> dict[str, dict[int, float]]:
    """Returns the candidates of each planned layer with their errors; those of the recipe's rules have no choice."""
    measured = {layer.name: layer.weight_errors for layer in sensitivity.layers}
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
