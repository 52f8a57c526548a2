r"""GPTQ: rounds the weights of a layer column by column, and corrects later columns for the error of each one.

    minimise |W X - W_hat X|^2 over codes, with H = X X^T:
    q_k = round(w_k / s),   e_k = (w_k - s q_k) / U_kk,   w_j -= e_k U_kj for every j > k,   U^T U = (H + d I)^-1

Columns are rounded in the order of H_kk, the largest first, so that many columns are left to correct for their errors.

References:
    GPTQ, arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_cli.quant.grid import Grid
from edadm_cli.quant.operation import Operation

_BLOCK = 128  # the number of columns whose errors are passed to all later columns in one product
_DAMPING = 0.01  # d, as a share of the mean of H_kk
_TINY = 1e-8


def input_columns(x: Tensor, operation: Operation, kernel: tuple[int, ...]) -> Tensor:
    """Returns the vectors that the rows of a flattened weight multiply, with shape `(positions, K)`, float32.

    Args:
        x: The input, `[N, C, H, W]` or `[..., C]`.
        operation: The operation of the layer, which has one group.
        kernel: `(kh, kw)` of a convolution, of which K is the product with C; `()` of a linear layer.
    """
    if operation.kind == "linear":
        return x.float().flatten(0, -2)
    columns = F.unfold(x.float(), kernel, operation.dilation, operation.padding, operation.stride)  # [N, K, L]
    return columns.transpose(1, 2).flatten(0, 1)


def gptq_codes(weight: Tensor, scale: Tensor, hessian: Tensor, grid: Grid, multipliers: Tensor | None = None) -> Tensor:
    """Returns the integers that GPTQ rounds `weight` to, int8, in the shape of `weight`.

    Args:
        weight: The weight, with shape `(C_out, ...)`.
        scale: The scale per output channel, with shape `(C_out,)`.
        hessian: H, or its mean over the positions, with shape `(K, K)`, float32.
        grid: The grid of the codes.
        multipliers: The multiplier of each weight, in the shape of `weight`; an integer is a code times its multiplier.
    """
    rows, scale = weight.float().flatten(1).clone(), scale.to(weight.device).float()
    factors = torch.ones_like(rows) if multipliers is None else multipliers.to(rows).flatten(1)
    hessian = hessian.float().clone()
    energy = hessian.diagonal()
    energy += _DAMPING * energy.mean().clamp_min(_TINY)
    order = energy.argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    rows, factors, codes = rows[:, order], factors[:, order], torch.empty_like(rows)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        block, errors = rows[:, start:stop].clone(), torch.empty_like(rows[:, start:stop])
        for place in range(stop - start):
            column = start + place
            step = scale * factors[:, column]
            code = (block[:, place] / step).round().clamp(grid.quant_min, grid.quant_max)
            errors[:, place] = (block[:, place] - code * step) / factor[column, column]
            block[:, place + 1 :] -= errors[:, place, None] * factor[column, column + 1 : stop]
            codes[:, column] = code * factors[:, column]
        rows[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.int8).view(weight.shape)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Returns U, upper triangular, with U^T U = hessian^-1."""
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)
