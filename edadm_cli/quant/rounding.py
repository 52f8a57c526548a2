r"""Learned rounding (AdaRound): learns for every weight whether it is rounded down or up.

    h(alpha) = clip(1.2 * sigmoid(tau * alpha) - 0.1, 0, 1)
    w_int    = clamp(floor(w / scale) + h(alpha), quant_min, quant_max)

With tau = 1 this is AdaRound. A tau that grows while alpha is learned drives every h to 0 or 1, so that the learned
weights are the deployed ones, where h >= 0.5 rounds up.

References:
    AdaRound, arXiv 2004.10568, equations 16, 23 and 24.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_UNDECIDED_LOW, _UNDECIDED_HIGH = 0.05, 0.95
_TINY = 1e-30


def rectified_sigmoid(alpha: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """Returns h(alpha), between 0 (down) and 1 (up); `sharpness` is tau."""
    return (torch.sigmoid(sharpness * alpha) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)


def sharpness_at(progress: float, last: float, start: float) -> float:
    """Returns tau after a share `progress` of the iterations: 1 up to `start`, then a geometric growth to `last`.

    tau = last ^ max(0, (progress - start) / (1 - start))

    Args:
        progress: Iterations done over all iterations, from 0 to 1.
        last: The value of tau at the end; 1 leaves h as AdaRound has it.
        start: The share of the iterations after which tau grows, at least 0 and less than 1.
    """
    return float(last ** max(0.0, (progress - start) / (1 - start)))


def undecided_share(up: Tensor) -> float:
    """Returns the share of weights whose h = `up` is neither down nor up: 0.05 < h < 0.95."""
    return float(((up > _UNDECIDED_LOW) & (up < _UNDECIDED_HIGH)).float().mean())


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the alpha whose h is the fraction that flooring drops, so that learning starts at the float weights."""
    scaled = weight / scale
    fraction = scaled - scaled.floor()
    return -torch.log((_STRETCH_HIGH - _STRETCH_LOW) / (fraction - _STRETCH_LOW) - 1)


def rounding_regularizer(up: Tensor, beta: Tensor | float) -> Tensor:
    """Returns sum(1 - |2 h - 1|^beta) over h(alpha) = `up`, which is zero once every h is 0 or 1."""
    result: Tensor = _Regularizer.apply(up, beta)
    return result


class _Regularizer(torch.autograd.Function):
    """Computes the power once, for the value and for the gradient -2 beta |d|^beta / d with d = 2 h - 1."""

    @staticmethod
    def forward(ctx, up, beta):  # type: ignore[no-untyped-def]
        distance = up.mul(2).sub_(1)
        power = distance.abs().pow_(beta)
        ctx.beta = beta
        ctx.save_for_backward(distance, power)
        return (1 - power).sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        distance, power = ctx.saved_tensors
        slope = power / (distance + _TINY)  # 0 where the distance is 0; beside any other distance _TINY vanishes
        return slope.mul_(-2 * ctx.beta * grad), None
