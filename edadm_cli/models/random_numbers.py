"""Generates random numbers that are the same on every device, in integer arithmetic.

Each element has a number of its own; a mixing function turns it into 64 bits. The sum of their four 16-bit parts is
nearly normal: it reaches 3.46 standard deviations, and its density is within 3% of a normal one.

References:
    Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The increment and the two factors of SplitMix64, as signed 64-bit numbers."""
_PART, _EVEN_PARTS = 0xFFFF, 0x0000FFFF0000FFFF
_MEAN = 2 * _PART
_DEVIATION = math.sqrt(4 * (2**32 - 1) / 12)
_CHUNK = {"cpu": 2**15, "cuda": 2**25}  # elements at a time: what a processor's cache holds, or a GPU's memory


def fill_nearly_normal(out: Tensor, seed: int, gain: float = 1.0, mean: float = 0.0) -> None:
    """Fills a tensor with nearly normal values of standard deviation `gain` around `mean`.

    Args:
        out: Contiguous, any shape, floating point, on a CPU or a GPU; values are rounded to its element type.
        seed: Below 2^32; another seed gives independent values.
        gain: Standard deviation.
        mean: Mean.
    """
    scale = gain / _DEVIATION
    flat, size = out.view(-1), _CHUNK.get(out.device.type, _CHUNK["cpu"])
    for start in range(0, flat.numel(), size):
        stop = min(start + size, flat.numel())
        words = torch.arange(start + 1, stop + 1, device=out.device)
        flat[start:stop] = _sums(words, seed).mul_(scale).add_(mean - _MEAN * scale)


def _sums(words: Tensor, seed: int) -> Tensor:
    """Returns the sums of the parts of the mixed words, float32, which holds them exactly; `words` is overwritten."""
    words.mul_(_STEP).add_(_mixed_seed(seed))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    words.bitwise_xor_(_shifted(words, 31))
    pairs = words & _EVEN_PARTS
    pairs.add_(words.bitwise_right_shift_(16).bitwise_and_(_EVEN_PARTS))  # two sums of 17 bits, 32 bits apart
    return pairs.add_(pairs >> 32).bitwise_and_(2**18 - 1).float()


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Returns the words shifted to the right as unsigned ones: torch's shift copies the sign."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _mixed_seed(seed: int) -> int:
    """Returns a number far from those of other seeds, as a signed 64-bit number."""
    value = (seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    return value - 2**64 if value >= 2**63 else value
