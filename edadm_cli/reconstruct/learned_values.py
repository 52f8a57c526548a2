"""The learned values of a unit: rounding variables, activation scales, and vectors with one value per channel.

Each kind is one flat tensor, so that a step takes a few operations on long tensors instead of many on short ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edadm_cli.quant.groups import per_weight
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.rounding import initial_alpha, rectified_sigmoid, undecided_share

_SMALLEST_SHARE = 1e-2
_EDGE = 0.45  # of a code's cell, in codes


class LearnedWeights(ABC):
    """The weights of a unit, whose codes depend on learned variables.

    Args:
        weights: Full-precision weights by part name.
        scales: Their scales by part name, `[C_out]` each.
        plans: Their bits by part name.
        multipliers: The multipliers of the parts with groups, `[C_out, num_groups]` each.
    """

    variables: nn.Parameter

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
        grids = [plans[name].weight_grid for name in weights]
        self.low = self._per_element([grid.quant_min for grid in grids], flat)
        self.high = self._per_element([grid.quant_max for grid in grids], flat)
        self._begin(flat)

    @abstractmethod
    def _begin(self, flat: Tensor) -> None:
        """Sets the variables to their first values, from all weights as one flat tensor."""

    @abstractmethod
    def current(self, decided: bool) -> tuple[Tensor, Tensor]:
        """Returns the codes, differentiable in the variables unless decided, and h, both flat."""

    @abstractmethod
    def sharpen(self, tau: float) -> None:
        """Sets tau, which says how sharply h turns from 0 to 1."""

    @abstractmethod
    def keep_in_range(self) -> None:
        """Keeps the variables where they have an effect, after the optimizer has changed them."""

    @abstractmethod
    def undecided(self) -> float:
        """Returns the share of the weights whose h is neither 0 nor 1: the deployed codes differ from those learned."""

    def weights(self, decided: bool, scales: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the weights by part name, differentiable in the variables unless decided, and h, flat.

        Args:
            decided: Whether codes are whole numbers, as they are deployed.
            scales: The scales of the parts, `[C_out]` each, if they are learned.
        """
        codes, up = self.current(decided)
        if scales is None:
            return self._split(codes * self.scale), up
        pieces = self._split(codes if self.multiplier is None else codes * self.multiplier)
        return {name: piece * scales[name].view(-1, *[1] * (piece.dim() - 1)) for name, piece in pieces.items()}, up

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """Returns the deployed integers by part name, int8: codes times multipliers."""
        codes, _ = self.current(decided=True)
        return self._split((codes if self.multiplier is None else codes * self.multiplier).to(torch.int8))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _per_element(self, bounds: list[int], like: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=like.device)
        return torch.tensor(bounds, device=like.device, dtype=like.dtype).repeat_interleave(sizes)


class LearnedRounding(LearnedWeights):
    """Codes that are rounded down or up: `clamp(floor(w / scale) + h(alpha), low, high)` (AdaRound)."""

    def _begin(self, flat: Tensor) -> None:
        floor = (flat / self.scale).floor()
        # clamp(floor + h, low, high) as down + is_free * h, because 0 <= h <= 1: a step needs no clamp of every weight
        self.down = floor.clamp(self.low, self.high)
        self.is_free = ((floor >= self.low) & (floor < self.high)).to(flat.dtype)
        self.variables = nn.Parameter(initial_alpha(flat, self.scale))
        self.sharpness = torch.ones((), device=flat.device)  # tau; changed in place for CUDA graphs
        del self.low, self.high

    def current(self, decided: bool) -> tuple[Tensor, Tensor]:
        """Returns the codes and h(alpha); decided, h is 1 where h >= 0.5."""
        alpha = self.variables
        up = (alpha.detach() >= 0).float() if decided else rectified_sigmoid(alpha, self.sharpness)
        return torch.addcmul(self.down, self.is_free, up), up

    def sharpen(self, tau: float) -> None:
        """Sets tau."""
        self.sharpness.fill_(tau)

    def keep_in_range(self) -> None:
        """Does nothing: every alpha has its h."""

    def undecided(self) -> float:
        """Returns the share of the weights with 0.05 < h < 0.95."""
        return undecided_share(self.current(decided=False)[1].detach())


class StraightThroughCodes(LearnedWeights):
    """Codes that go on from learned ones and may take any value: `round(u)`.

    The gradient of rounding is that of the identity (straight-through). u begins at w / scale as far as that rounds to
    the learned code, else at the edge of its cell.

    Args:
        weights: Full-precision weights by part name.
        scales: Their scales by part name, `[C_out]` each.
        plans: Their bits by part name.
        multipliers: The multipliers of the parts with groups, `[C_out, num_groups]` each.
        learned: The learned integers by part name: codes, times multipliers in parts with groups.

    References:
        LSQ, arXiv 1902.08153, section 2.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        plans: Mapping[str, LayerPlan],
        multipliers: Mapping[str, Tensor] | None,
        learned: Mapping[str, Tensor],
    ) -> None:
        self._learned: Mapping[str, Tensor] = learned
        super().__init__(weights, scales, plans, multipliers)

    def _begin(self, flat: Tensor) -> None:
        codes = torch.cat([self._learned[name].to(flat).flatten() for name in self.shapes])
        if self.multiplier is not None:
            codes = codes / self.multiplier
        scaled = flat / self.scale
        self.variables = nn.Parameter(scaled.clamp(codes - _EDGE, codes + _EDGE))

    def current(self, decided: bool) -> tuple[Tensor, Tensor]:
        """Returns the codes; nothing is between two of them, so that h is the same."""
        codes: Tensor = _RoundStraightThrough.apply(self.variables)
        return codes, codes

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Lets no u round to a code that is not on the grid."""
        self.variables.clamp_(self.low - _EDGE, self.high + _EDGE)

    def sharpen(self, tau: float) -> None:
        """Does nothing: codes are rounded from the first step on."""

    def undecided(self) -> float:
        """Returns 0: learned codes are the deployed ones."""
        return 0.0


class _RoundStraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.round()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


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
