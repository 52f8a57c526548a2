"""The real images that samples are compared with: shipped digits, a folder, a file of arrays, or a named dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError
from edadm_cli.evaluate.datasets import DATASETS_REGISTRY, open_dataset
from edadm_cli.evaluate.images import to_rgb
from edadm_cli.evaluate.metrics import NEIGHBOURS
from edadm_cli.evaluate.representation import Layer, Statistics
from edadm_cli.models.digits import data as digits

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STATISTICS_KEYS: dict[Layer, tuple[str, str]] = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
IMAGES_KEY = "arr_0"

ImageLoader = Callable[[tuple[int, int]], Dataset[Tensor]]


@dataclass(frozen=True)
class RealImages:
    """What is known of the real distribution.

    Args:
        name: What it is, for people to read.
        digest: Hash of its content.
        statistics: Mean and covariance of features by layer (`pooled`, `spatial`), where they come
            ready-made.
        images: Gives the images as a dataset of uint8 `(3, H, W)` for a height and a width; `None` where
            there are statistics only.
        fetch: Makes the images available, where they may have to be downloaded first.
    """

    name: str
    digest: str
    statistics: Mapping[Layer, Statistics]
    images: ImageLoader | None
    fetch: Callable[[], object] = lambda: None


class ArrayImages(Dataset[Tensor]):
    """Images in memory, uint8 with shape `(N, C, H, W)`, as a dataset of `(3, H, W)`."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_rgb(self.images[index])


class FileImages(Dataset[Tensor]):
    """Image files as a dataset of uint8 `(3, H, W)`: the shorter side resized, the rest cut off evenly."""

    def __init__(self, files: list[Path], size: tuple[int, int]) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        try:
            with Image.open(path) as picture:
                return fitted(picture, self.size)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is not a readable image.") from error


class DatasetImages(Dataset[Tensor]):
    """A dataset of uint8 `(3, H, W)` at another size, as `FileImages`."""

    def __init__(self, images: Any, size: tuple[int, int]) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        return image if image.shape[1:] == self.size else fitted(to_pil_image(image), self.size)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as uint8 `(3, H, W)`: the shorter side resized, the rest cut off evenly."""
    height, width = size
    pixels = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def shipped_digits(image_size: int) -> RealImages:
    """Return MNIST: statistics of the 60,000 training images, and the 10,000 test images.

    Raises:
        InputError: The shipped files are not there.
    """
    folder = digits.model_folder("data")
    files = [folder / digits.TEST_IMAGES_FILE, folder / digits.STATISTICS_FILE]
    stored = digits.real_statistics(image_size)
    kinds: dict[Layer, str] = {"pooled": "features", "spatial": "spatial"}
    statistics = {
        layer: Statistics(stored[f"{kind}_mean"].numpy(), stored[f"{kind}_cov"].numpy())
        for layer, kind in kinds.items()
    }
    images = digits.real_images(image_size)
    return RealImages(
        name="MNIST (Fréchet distances: 60,000 training images; others: 10,000 test images)",
        digest=_digest([(path.name, file_sha256(path)) for path in files]),
        statistics=statistics,
        images=lambda size: ArrayImages(images),
    )


def open_real(place: str) -> RealImages:
    """Open a folder of images, an npz file of statistics, of images, or of both, or a dataset of torch-fidelity.

    The arrays of a file are named as usual: `mu, sigma` and `mu_s, sigma_s` for mean and covariance of pooled
    and spatial features, `arr_0` for uint8 images with shape `(N, H, W, 3)`.

    Raises:
        InputError: There is nothing there, or nothing that can be used.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_arrays(path)
    if place in DATASETS_REGISTRY:
        return _named_dataset(place)
    raise InputError(
        f"Real images were wanted in {path} (--real), found no such folder or file, "
        f"nor a dataset of that name ({', '.join(DATASETS_REGISTRY)})."
    )


def _named_dataset(name: str) -> RealImages:
    """A dataset of torch-fidelity, whose content its name decides; opened when it is needed."""
    opened = cache(lambda: open_dataset(name))
    return RealImages(
        name=name,
        digest=_digest([("torch-fidelity", name)]),
        statistics={},
        images=lambda size: DatasetImages(opened(), size),
        fetch=opened,
    )


def _open_folder(folder: Path) -> RealImages:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(files) <= NEIGHBOURS:
        raise InputError(
            f"{folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}); more than {NEIGHBOURS} were wanted."
        )
    return RealImages(
        name=f"{len(files)} images in {folder.name}",
        digest=_digest([(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files]),
        statistics={},
        images=lambda size: FileImages(files, size),
    )


def _open_arrays(path: Path) -> RealImages:
    wanted = [key for keys in STATISTICS_KEYS.values() for key in keys] + [IMAGES_KEY]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in wanted if key in file.files}
    except (OSError, ValueError, BadZipFile, AttributeError, EOFError) as error:
        raise InputError(f"{path} is not a readable npz file of plain arrays.") from error
    statistics = {
        layer: _check_statistics(path, arrays[mean], arrays[covariance])
        for layer, (mean, covariance) in STATISTICS_KEYS.items()
        if mean in arrays and covariance in arrays
    }
    if not statistics and IMAGES_KEY not in arrays:
        raise InputError(f"{path} holds neither statistics (mu, sigma) nor images ({IMAGES_KEY}).")
    images = _check_array_images(path, arrays[IMAGES_KEY]) if IMAGES_KEY in arrays else None
    return RealImages(
        name=path.name,
        digest=file_sha256(path),
        statistics=statistics,
        images=None if images is None else lambda size: ArrayImages(images),
    )


def _check_statistics(path: Path, mean: NDArray[np.generic], covariance: NDArray[np.generic]) -> Statistics:
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise InputError(
            f"{path} holds a mean of shape {mean.shape} and a covariance of shape {covariance.shape}; "
            "(D,) and (D, D) were wanted."
        )
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64))


def _check_array_images(path: Path, images: NDArray[np.generic]) -> Tensor:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"{path} holds {IMAGES_KEY} as {images.dtype} with shape {images.shape}; "
            "uint8 with shape (N, H, W, 3) was wanted."
        )
    if len(images) <= NEIGHBOURS:
        raise InputError(f"{path} holds {len(images)} images; more than {NEIGHBOURS} were wanted.")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _digest(entries: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, content in entries:
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()
