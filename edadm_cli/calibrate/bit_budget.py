r"""The bits of each layer that a budget is spent on best: an integer program.

    minimise    sum_l sum_b E_{l,b} x_{l,b}
    subject to  sum_b x_{l,b} = 1 for every layer l,   sum_l sum_b n_l b x_{l,b} <= B,   x in {0, 1}

where E_{l,b} is the error of layer l at b bits, n_l its number of weights, and B the budget in bits. Errors of
different layers are taken to add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from edadm_cli.errors import UsageError


def assign_bits(
    errors: Mapping[str, Mapping[int, float]], num_weights: Mapping[str, int], budget_bits: float
) -> dict[str, int]:
    """Choose a number of bits per layer.

    Args:
        errors: Layer -> number of bits -> error. Layers may have different candidates.
        num_weights: Layer -> number of weights.
        budget_bits: B, bits of all weights together.

    Returns:
        Layer -> number of bits.

    Raises:
        UsageError: The budget is smaller than every layer at its fewest bits.
    """
    fewest = sum(num_weights[name] * min(widths) for name, widths in errors.items())
    if budget_bits < fewest:
        total = sum(num_weights[name] for name in errors)
        raise UsageError(
            f"A budget of {budget_bits / total:.3g} bits per weight is too small: the fewest that were measured are"
            f" {fewest / total:.3g}.",
            hint="a larger --average-bits",
        )
    columns = [(name, bits) for name, widths in errors.items() for bits in sorted(widths)]
    cost = np.array([errors[name][bits] for name, bits in columns])
    size = np.array([float(num_weights[name] * bits) for name, bits in columns])
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
