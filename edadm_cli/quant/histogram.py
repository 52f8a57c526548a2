r"""A histogram of a tensor's values, to which batches are added on their device, without synchronization.

The bins have the width 2^(e - b) and are symmetric about zero, where 2^e is the smallest power of two above every |x|
that was added, and b = `_BITS`. If a batch raises e, pairs of bins are merged exactly. The counts of several batches
thus equal those of one large batch, in any order, and no batch is needed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 11
_HALF = 1 << _BITS  # bins on either side of zero
_SMALLEST = -32  # e of a tensor of zeros
_CHUNK = 1 << 24  # elements that are counted at once: float32 counts up to here are exact


class Histogram:
    """Holds the counts, the minimum and the maximum of all values that were added.

    Args:
        device: The device of the values and the counts.

    Attributes:
        counts: The number of values per bin, int64, with shape `(2 * 2^b,)`.
        exponent: e, int32, with shape `()`.
        low: The smaller of the smallest value and zero, with shape `()`.
        high: The larger of the largest value and zero, with shape `()`.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=device)
        self.exponent = torch.full((), _SMALLEST, dtype=torch.int32, device=device)
        self.low, self.high = torch.zeros((), device=device), torch.zeros((), device=device)
        self._bins = torch.arange(-_HALF, _HALF, device=device)

    @classmethod
    def of(cls, *tensors: Tensor) -> Histogram:
        """Returns the histogram of all values of some tensors on one device."""
        histogram = cls(tensors[0].device)
        for tensor in tensors:
            histogram.add(tensor)
        return histogram

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Adds the values of `x`, which has any shape. A value that is not finite makes `low` or `high` not finite."""
        x = x.detach().float().reshape(-1)
        low, high = x.aminmax()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        exponent = torch.maximum(self.exponent, torch.frexp(torch.maximum(-low, high)).exponent.to(torch.int32))
        halvings = (exponent - self.exponent).clamp(max=_BITS + 1)
        merged = (self._bins >> halvings) + _HALF
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts)
        self.exponent = exponent
        for piece in x.split(_CHUNK):
            bins = (piece * self._power(_BITS - exponent)).floor_().add_(_HALF + 0.5)
            self.counts += torch.histc(bins, bins=2 * _HALF, min=0, max=2 * _HALF).long()

    @property
    def is_finite(self) -> Tensor:
        """Returns whether every value is finite, as a bool tensor with shape `()`."""
        return torch.isfinite(self.high - self.low)

    def bins(self) -> tuple[Tensor, Tensor]:
        """Returns the centers of the bins and the share of all values in each, float32, with shape `(n,)` each.

        Empty bins are omitted on a CPU. They are kept on a GPU, where removing them would need a synchronization.
        """
        centers = (self._bins + 0.5) * self._power(self.exponent - _BITS)
        shares = (self.counts / self.counts.sum()).float()
        if shares.is_cuda:
            return centers, shares
        return centers[self.counts > 0], shares[self.counts > 0]

    @staticmethod
    def _power(exponent: Tensor) -> Tensor:
        return torch.ldexp(torch.ones((), device=exponent.device), exponent)
