r"""Weights in groups: a whole number per group of weights, beside the scale per output channel.

    w_hat[c, k] = weight_scale[c] * multiplier[c, k // G] * code[c, k]

k counts the weights of output channel c, `[C_in / groups, kh, kw]` flattened, and G is the group size. A code has
`weight_bits`; a multiplier is one of -8 to -1 and 1 to 8, and takes four bits. Their product fits eight bits, so that
every engine multiplies it as it multiplies codes of eight bits, exactly. A negative multiplier puts the code that has
no opposite, such as -8, on the side of a group that reaches further.

References:
    QServe, arXiv 2405.04532, section 4.1 (progressive group quantization: groups whose scales are integers).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_cli.errors import InputError
from edadm_cli.quant.grid import Grid
from edadm_cli.quant.packing import pack, unpack
from edadm_cli.quant.storage import MULTIPLIER_BITS
from edadm_cli.recipe import RangeRecipe

LARGEST_MULTIPLIER = 8
_SMALLEST_SHARE, _NUM_SHARES = 0.4, 12  # scales that are tried, as shares of the one that covers the whole channel
_TINY = 1e-8


def num_groups(per_row: int, size: int) -> int:
    """Returns the number of groups of `size` weights in a channel of `per_row` weights; the last one may be short."""
    return -(-per_row // size)


def packed_multipliers(multipliers: Tensor) -> Tensor:
    """Packs multipliers, int8 `[C_out, num_groups]`, to uint8 `[C_out, ceil(num_groups / 2)]`: two take a byte."""
    return pack(multipliers - (multipliers > 0).to(multipliers.dtype), MULTIPLIER_BITS)


def unpacked_multipliers(packed: Tensor, count: int) -> Tensor:
    """Returns the multipliers, int8 `[C_out, count]`, that `packed_multipliers` packed."""
    values = unpack(packed, (packed.shape[0], count), MULTIPLIER_BITS)
    return values + (values >= 0).to(values.dtype)


def per_weight(multipliers: Tensor, shape: tuple[int, ...], size: int) -> Tensor:
    """Returns the multiplier of each weight, in the weight's `shape` `(C_out, ...)`."""
    per_row = torch.Size(shape[1:]).numel()
    return multipliers.repeat_interleave(size, dim=1)[:, :per_row].reshape(shape)


def codes_of(integers: Tensor, multipliers: Tensor, size: int) -> Tensor:
    """Returns the codes, int8, whose products with the multipliers of their groups are `integers`.

    Args:
        integers: int8, with shape `(C_out, ...)`.
        multipliers: int8, with shape `(C_out, num_groups)`.
        size: The number of weights per group.

    Raises:
        InputError: A multiplier is not one of -8 to -1 and 1 to 8, or it does not divide an integer of its group.
    """
    sizes = multipliers.abs()
    if bool(((sizes < 1) | (sizes > LARGEST_MULTIPLIER)).any()):
        raise InputError(f"The multipliers of groups are -{LARGEST_MULTIPLIER} to -1 and 1 to {LARGEST_MULTIPLIER}.")
    factors = per_weight(multipliers, tuple(integers.shape), size)
    codes = torch.div(integers, factors, rounding_mode="trunc")
    if not torch.equal(codes * factors, integers):
        raise InputError("A weight's integer is no multiple of the multiplier of its group.")
    return codes.to(torch.int8)


def search_groups(
    weight: Tensor, grid: Grid, size: int, recipe: RangeRecipe, energy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the scale per output channel, float32 `(C_out,)`, and the multipliers, int8 `(C_out, num_groups)`.

    For each of several scales, every group takes the multiplier with the smallest error of its weights; of the scales,
    every output channel takes the one with the smallest error. With `ranges.weight = "minmax"` only the scale that
    covers the channel is tried, and no code is clipped.

    Args:
        weight: The weight, with shape `(C_out, ...)`.
        grid: The grid of the codes.
        size: The number of weights per group.
        recipe: The recipe's ranges.
        energy: E[x^2] of the input of each weight, in the shape of `weight`, for the error of the outputs; without it,
            the error is that of the weights, sum |w - w_hat|^norm.
    """
    groups = _grouped(weight.detach().float(), size)  # [C_out, n, G]
    energy = None if energy is None else _grouped(energy, size)
    full = groups.abs().amax(dim=(1, 2)).clamp_min(_TINY) / (-grid.quant_min * LARGEST_MULTIPLIER)
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    best_multiplier = torch.ones(groups.shape[:2], device=weight.device)
    for scale in _scales(full, grid, recipe):
        multiplier, error = _best_multipliers(groups, scale, grid, recipe, energy)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
        best_multiplier = torch.where(better[:, None], multiplier, best_multiplier)
    return best_scale, best_multiplier.to(torch.int8)


def _scales(full: Tensor, grid: Grid, recipe: RangeRecipe) -> Iterator[Tensor]:
    if recipe.weight == "minmax":
        yield full * (-grid.quant_min / grid.quant_max)  # both signs of the largest weight are on the grid
        return
    for step in range(_NUM_SHARES):
        yield full * (1 - (1 - _SMALLEST_SHARE) * step / _NUM_SHARES)


def _best_multipliers(
    groups: Tensor, scale: Tensor, grid: Grid, recipe: RangeRecipe, energy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the best multiplier of each group, `[C_out, n]`, and the error of each output channel, `[C_out]`."""
    if recipe.weight == "minmax":
        needed = groups.abs().amax(dim=2) / (grid.quant_max * scale[:, None])
        return (needed - _TINY).ceil().clamp(1, LARGEST_MULTIPLIER), torch.zeros_like(scale)
    best = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    chosen = torch.ones_like(best)
    for multiplier in (sign * size for size in range(1, LARGEST_MULTIPLIER + 1) for sign in (1, -1)):
        step = (scale * multiplier)[:, None, None]
        difference = (groups / step).round_().clamp_(grid.quant_min, grid.quant_max).mul_(step).sub_(groups)
        if energy is None:
            error = difference.abs_().pow_(recipe.norm).sum(dim=2)
        else:
            error = difference.square_().mul_(energy).sum(dim=2)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, multiplier, chosen)
    return chosen, best.sum(dim=1)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """Returns the weights as `[C_out, num_groups, size]`, where a short last group is filled up with zeros."""
    rows = weight.flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % size)).view(len(rows), -1, size)
