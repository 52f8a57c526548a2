"""Real images as datasets of torch: image files, arrays, and the datasets of torch-fidelity.

The files are not trusted: any error of a decoder becomes one sentence that names the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from edadm_cli.errors import InputError
from edadm_cli.evaluate.images import to_rgb

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
    """Returns the pixels of a file as uint8 `(3, H, W)`; without a size, checks the header and returns no pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are allowed here
            with Image.open(path, formats=_FORMATS) as picture:
                if 0 not in picture.size:
                    return torch.empty(0) if size is None else fitted(picture, size)
    except Exception as error:  # each of Pillow's decoders raises other kinds of errors
        raise InputError(f"{path} is not a readable image.") from error
    raise InputError(f"{path} is an image of {picture.width} x {picture.height} pixels, which has no area.")
