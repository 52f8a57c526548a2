"""Reads real images from files: image files, and npz archives of images or of their statistics.

The files are not trusted: objects are never unpickled, and any error of a decoder becomes one sentence that names the
file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from edadm_cli.errors import InputError
from edadm_cli.evaluate.images import to_rgb
from edadm_cli.metrics.base import NEIGHBOURS
from edadm_cli.metrics.representation import Layer, Statistics

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STATISTICS_KEYS: dict[Layer, tuple[str, str]] = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
IMAGES_KEY = "arr_0"
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class ArrayImages(Dataset[Tensor]):
    """Images in memory, uint8 with shape `(N, C, H, W)`, as a dataset of `(3, H, W)`."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_rgb(self.images[index])


class FileImages(Dataset[Tensor]):
    """Image files as a dataset of uint8 `(3, H, W)`, resized by the shorter side and cropped at the centre."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int]) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return _read_picture(self.files[index], self.size)


class DatasetImages(Dataset[Tensor]):
    """A dataset of uint8 `(3, H, W)`, resized and cropped as in `FileImages`."""

    def __init__(self, images: Any, size: tuple[int, int]) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        return image if image.shape[1:] == self.size else fitted(to_pil_image(image), self.size)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Returns an image as uint8 `(3, H, W)`, resized by the shorter side and cropped at the centre."""
    height, width = size
    pixels = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def check_headers(files: Sequence[Path]) -> None:
    """Opens every image without decoding its pixels, so that a broken file is noticed before anything is sampled.

    Raises:
        InputError: A file is not an image, or an image without area.
    """
    for path in files:
        _read_picture(path, None)


def _read_picture(path: Path, size: tuple[int, int] | None) -> Tensor:
    """Returns the pixels of a file as uint8 `(3, H, W)`; without a size it checks the header and returns `None`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are allowed here
            with Image.open(path, formats=_FORMATS) as picture:
                if 0 not in picture.size:
                    return torch.empty(0) if size is None else fitted(picture, size)
    except Exception as error:  # each of Pillow's decoders raises other kinds of errors
        raise InputError(f"{path} is not a readable image.") from error
    raise InputError(f"{path} is an image of {picture.width} x {picture.height} pixels, which has no area.")


def read_arrays(path: Path) -> tuple[dict[Layer, Statistics], Tensor | None]:
    """Reads the statistics and the images of an npz file.

    Returns:
        Statistics by layer, and images as uint8 with shape `(N, C, H, W)`; `None` if the file has no images.

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


def _checked_images(path: Path, images: NDArray[np.generic]) -> Tensor:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:3]:
        raise InputError(
            f"{path} holds {IMAGES_KEY} as {images.dtype} with shape {images.shape}; "
            "uint8 with shape (N, H, W, 3) was expected."
        )
    if len(images) <= NEIGHBOURS:
        raise InputError(f"{path} holds {len(images)} images; more than {NEIGHBOURS} were expected.")
    return torch.from_numpy(images).permute(0, 3, 1, 2)
