"""Reads npz archives of real images, or of the statistics of their features.

The files are not trusted: objects are never unpickled, and any error of a decoder becomes one sentence that names the
file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edadm_cli.errors import InputError
from edadm_cli.metrics.base import NEIGHBOURS
from edadm_cli.metrics.representation import Layer, Statistics

STATISTICS_KEYS: dict[Layer, tuple[str, str]] = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
IMAGES_KEY = "arr_0"


def read_arrays(path: Path) -> tuple[dict[Layer, Statistics], NDArray[np.uint8] | None]:
    """Reads the statistics and the images of an npz file.

    Returns:
        Statistics by layer, and images as uint8 with shape `(N, H, W, C)`; `None` if the file has no images.

    Raises:
        InputError: The file is not an npz file of plain arrays, or an array has another type, shape or value than
            expected.
    """
    keys = [key for pair in STATISTICS_KEYS.values() for key in pair] + [IMAGES_KEY]
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with loaded as file:
            arrays = {key: file[key] for key in keys if key in file.files}
    except Exception as error:  # numpy, zipfile and zlib raise different kinds of errors
        raise InputError(f"{path} is not a readable npz file of plain arrays.") from error
    statistics = {
        layer: _checked_statistics(path, arrays[mean], arrays[covariance])
        for layer, (mean, covariance) in STATISTICS_KEYS.items()
        if mean in arrays and covariance in arrays
    }
    return statistics, _checked_images(path, arrays[IMAGES_KEY]) if IMAGES_KEY in arrays else None


def _checked_statistics(path: Path, mean: NDArray[np.generic], covariance: NDArray[np.generic]) -> Statistics:
    for name, array in (("mean", mean), ("covariance", covariance)):
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path} holds a {name} of type {array.dtype}; real numbers were expected.")
    size = mean.size
    if size == 0 or mean.shape != (size,) or covariance.shape != (size, size):
        raise InputError(
            f"{path} holds a mean of shape {mean.shape} and a covariance of shape {covariance.shape}; "
            "(D,) and (D, D) were expected."
        )
    statistics = Statistics(mean.astype(np.float64), covariance.astype(np.float64))
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
        raise InputError(f"{path} holds statistics that are not finite.")
    return statistics


def _checked_images(path: Path, images: NDArray[np.generic]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:3]:
        raise InputError(
            f"{path} holds {IMAGES_KEY} as {images.dtype} with shape {images.shape}; "
            "uint8 with shape (N, H, W, 3) was expected."
        )
    if len(images) <= NEIGHBOURS:
        raise InputError(f"{path} holds {len(images)} images; more than {NEIGHBOURS} were expected.")
    return images.view(np.uint8)
