"""Decides the seed of each image, so that neither its number in a batch nor the device changes its noise."""

from __future__ import annotations

CALIBRATION, EVALUATION = 0, 1
"""Streams of image seeds: images for calibration and images for evaluation never share their noise."""

_STRIDE = 1_000_003  # number of images of one seed and stream before their seeds repeat those of the next one


def image_seed(seed: int, index: int, stream: int = CALIBRATION) -> int:
    r"""Returns the seed of one image: $((2s + k)\, 1000003 + i) \bmod 2^{32}$ for seed $s$, stream $k$ and image $i$.

    Torch's CPU generator uses 32 bits of a seed, so distinct images keep distinct noise only within those.
    """
    return ((2 * seed + stream) * _STRIDE + index) % 2**32
