"""Packs the mean and covariance of features of real pictures for the files that ship with the package.

The numbers are stored in float32. A covariance is symmetric, so only its upper triangle is stored, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("features", "spatial")


def pack(statistics: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Returns `<prefix><kind>_mean` and `<prefix><kind>_cov_upper` for each kind, in float32.

    Args:
        statistics: `<kind>_mean (D,)` and the symmetric `<kind>_cov (D, D)`.
        prefix: Beginning of the names of the tensors.
    """
    import torch

    packed: dict[str, Tensor] = {}
    for kind in KINDS:
        covariance = statistics[f"{kind}_cov"]
        rows, columns = torch.triu_indices(len(covariance), len(covariance))
        packed[f"{prefix}{kind}_mean"] = statistics[f"{kind}_mean"].float().cpu().contiguous()
        packed[f"{prefix}{kind}_cov_upper"] = covariance[rows, columns].float().cpu().contiguous()
    return packed


def unpack(packed: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Returns `<kind>_mean (D,)` and `<kind>_cov (D, D)` of each kind in float64; the inverse of `pack`."""
    import torch

    statistics: dict[str, Tensor] = {}
    for kind in KINDS:
        mean = packed[f"{prefix}{kind}_mean"].double()
        rows, columns = torch.triu_indices(len(mean), len(mean))
        covariance = mean.new_zeros(len(mean), len(mean))
        covariance[rows, columns] = covariance[columns, rows] = packed[f"{prefix}{kind}_cov_upper"].double()
        statistics |= {f"{kind}_mean": mean, f"{kind}_cov": covariance}
    return statistics
