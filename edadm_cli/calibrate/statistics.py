"""Measures the input channels of layers over the calibration set: energies and magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.transforms import ChannelStatistics

_QUANTILE = 0.999


@dataclass
class _Sums:
    """Sums over the batches seen so far, one value per channel."""

    squares: Tensor
    count: int
    largest: Tensor


def channel_statistics(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    layers: Collection[str],
    calls: Iterable[Call],
) -> dict[str, ChannelStatistics]:
    """Returns the statistics of the inputs of some planned layers, by the name of the layer or its channel part.

    The magnitude of a channel is the largest over the batches of the 99.9% quantile of |x_c| within a batch.

    Args:
        denoiser: The denoiser at full precision.
        traced: Its trace.
        plan: Bits of every layer.
        layers: Names of the layers.
        calls: `(args, kwargs)` of the denoiser over the calibration set.
    """
    sums: dict[str, _Sums] = {}

    def observe(name: str, dim: int) -> Callable[..., None]:
        layer_plan = plan.layers[name]

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            pieces = layer_plan.split(inputs[0].detach().float(), dim)
            for part, piece in zip(layer_plan.part_names(name), pieces, strict=True):
                _add(sums, part, piece.movedim(dim, 0).flatten(1))

        return hook

    with Hooks() as hooks, torch.no_grad():
        for layer in traced.layers:
            if layer.name in layers:
                dim = Operation.of(layer.module).channel_dim
                hooks.before(layer.module, observe(layer.name, dim))
        for args, kwargs in calls:
            denoiser(*args, **kwargs)
    return {name: ChannelStatistics((s.squares / s.count).cpu(), s.largest.cpu()) for name, s in sums.items()}


def _add(sums: dict[str, _Sums], name: str, values: Tensor) -> None:
    """Adds a batch of values `[C, M]`."""
    rank = max(1, math.ceil(_QUANTILE * values.shape[1]))
    largest = values.abs().kthvalue(rank, dim=1).values
    squares = values.square().sum(dim=1)
    old = sums.get(name)
    if old is None:
        sums[name] = _Sums(squares, values.shape[1], largest)
    else:
        sums[name] = _Sums(old.squares + squares, old.count + values.shape[1], torch.maximum(old.largest, largest))
