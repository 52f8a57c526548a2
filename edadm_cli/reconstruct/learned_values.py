"""The learned values of a unit: rounding variables, activation scales, and vectors with one value per channel.

Each kind is one flat tensor, so that a step takes a few operations on long tensors instead of many on short ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edadm_cli.quant.groups import per_weight
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.rounding import initial_alpha, rectified_sigmoid

_SMALLEST_SHARE = 1e-2


class LearnedRounding:
    """The rounding variables of all weights of a unit.

    Args:
        weights: Full-precision weights by part name.
        scales: Their scales by part name, `[C_out]` each.
        plans: Their bits by part name.
        multipliers: The multipliers of the parts with groups, `[C_out, num_groups]` each.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        plans: Mapping[str, LayerPlan],
        multipliers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.sizes = [weight.numel() for weight in weights.values()]
        flat = torch.cat([weight.flatten() for weight in weights.values()])
        self.scale = torch.cat(
            [scales[name].to(flat).repeat_interleave(weight[0].numel()) for name, weight in weights.items()]
        )
        self.multiplier = _multiplier_per_weight(weights, plans, multipliers or {})
        if self.multiplier is not None:
            self.scale = self.scale * self.multiplier
        floor = (flat / self.scale).floor()
        grids = [plans[name].weight_grid for name in weights]
        low = self._per_element([grid.quant_min for grid in grids], flat)
        high = self._per_element([grid.quant_max for grid in grids], flat)
        # clamp(floor + h, low, high) as down + is_free * h, because 0 <= h <= 1: a step needs no clamp of every weight
        self.down, self.is_free = floor.clamp(low, high), ((floor >= low) & (floor < high)).to(flat.dtype)
        self.alpha = nn.Parameter(initial_alpha(flat, self.scale))
        self.sharpness = torch.ones((), device=flat.device)  # tau; changed in place for CUDA graphs

    def weights(self, decided: bool, scales: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the weights by part name, differentiable in alpha unless decided, and h, flat.

        Args:
            decided: Whether h is rounded to 0 or 1, as it is deployed.
            scales: The scales of the parts, `[C_out]` each, if they are learned.
        """
        up = (self.alpha.detach() >= 0).float() if decided else rectified_sigmoid(self.alpha, self.sharpness)
        codes = torch.addcmul(self.down, self.is_free, up)
        if scales is None:
            return self._split(codes * self.scale), up
        pieces = self._split(codes if self.multiplier is None else codes * self.multiplier)
        return {name: piece * scales[name].view(-1, *[1] * (piece.dim() - 1)) for name, piece in pieces.items()}, up

    def codes(self) -> dict[str, Tensor]:
        """Returns the deployed integers by part name, int8: codes rounded up where h >= 0.5, times multipliers."""
        codes = self.down + self.is_free * (self.alpha.detach() >= 0)
        return self._split((codes if self.multiplier is None else codes * self.multiplier).to(torch.int8))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _per_element(self, bounds: list[int], like: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=like.device)
        return torch.tensor(bounds, device=like.device, dtype=like.dtype).repeat_interleave(sizes)


def _multiplier_per_weight(
    weights: Mapping[str, Tensor], plans: Mapping[str, LayerPlan], multipliers: Mapping[str, Tensor]
) -> Tensor | None:
    """Returns the multipliers of all weights, flat; `None` if no part has groups."""
    if not multipliers:
        return None
    pieces = []
    for name, weight in weights.items():
        size, factors = plans[name].group_size, torch.ones_like(weight)
        if size is not None:
            factors = per_weight(multipliers[name].to(weight), tuple(weight.shape), size)
        pieces.append(factors.flatten())
    return torch.cat(pieces)


class LearnedScales:
    """All activation scales of a unit.

    Args:
        first: Initial scales by name.
        relative: Whether the learning rate is relative to each scale's initial value, or absolute.
        device: The device of the scales.
    """

    def __init__(self, first: Mapping[str, Tensor], relative: bool, device: torch.device) -> None:
        self.names = list(first)
        values = torch.stack([scale.reshape(()) for scale in first.values()]) if first else torch.zeros(0)
        values = values.to(device)
        self.unit = values if relative else torch.ones_like(values)
        self.factor = nn.Parameter(values / self.unit)
        self.smallest = self.factor.detach() * _SMALLEST_SHARE

    def values(self) -> dict[str, Tensor]:
        """Returns the scales by name, differentiable in `factor`."""
        return dict(zip(self.names, (self.factor * self.unit).unbind(), strict=True))

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Lets no step take a scale below a hundredth of its first value."""
        self.factor.clamp_(min=self.smallest)


class LearnedVectors:
    """Vectors of a unit with one value per channel: v = v_0 + u * delta, where delta is learned from zero on.

    Args:
        first: v_0 by name.
        units: u by name, the unit of the learning rate; a vector without one is a scale, whose u is v_0.
        device: The device of the vectors.
    """

    def __init__(self, first: Mapping[str, Tensor], units: Mapping[str, Tensor], device: torch.device) -> None:
        self.names, self.sizes = list(first), [vector.numel() for vector in first.values()]
        self.first = self._flat(first, device)
        self.unit = self._flat({name: units.get(name, vector) for name, vector in first.items()}, device)
        bound = {
            name: torch.full_like(vector, -torch.inf if name in units else _SMALLEST_SHARE - 1)
            for name, vector in first.items()
        }
        self.smallest = self._flat(bound, device)
        self.delta = nn.Parameter(torch.zeros_like(self.first))

    def values(self) -> dict[str, Tensor]:
        """Returns the vectors by name, differentiable in `delta`."""
        return dict(zip(self.names, (self.first + self.unit * self.delta).split(self.sizes), strict=True))

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Lets no step take a scale below a hundredth of its first value."""
        self.delta.clamp_(min=self.smallest)

    @staticmethod
    def _flat(vectors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        empty = torch.zeros(0, device=device)
        return torch.cat([empty, *(vector.detach().to(device, torch.float32) for vector in vectors.values())])
