"""Finds the prediction in what a denoiser returns, whose form differs between architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prediction_of(output: Any) -> Tensor:
    """Returns the prediction, `[rows, ...]`, in a denoiser's output: an output object, a tuple, or the tensor itself.

    A prediction that is a list with one tensor per row (Z-Image) is stacked.
    """
    first = output if isinstance(output, Tensor) else output[0]
    prediction: Tensor = torch.stack(first) if isinstance(first, list) else first
    return prediction
