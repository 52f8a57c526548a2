r"""Learned rounding (AdaRound): every weight learns whether it is rounded down or up.

    h(alpha) = clip(1.2 * sigmoid(alpha) - 0.1, 0, 1)
    w_int    = clamp(floor(w / scale) + h(alpha), quant_min, quant_max)

References:
    AdaRound, arXiv 2004.10568, equations 16, 23 and 24.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha), between 0 (down) and 1 (up)."""
    return (torch.sigmoid(alpha) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """The alpha whose h is the fraction that flooring drops, so that learning starts at the float weights."""
    scaled = weight / scale
    fraction = scaled - scaled.floor()
    return -torch.log((_STRETCH_HIGH - _STRETCH_LOW) / (fraction - _STRETCH_LOW) - 1)


def rounding_regularizer(up: Tensor, beta: Tensor | float) -> Tensor:
    """sum(1 - |2 h - 1|^beta) over h(alpha) = `up`: zero once every weight has decided."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()
