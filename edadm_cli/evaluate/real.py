"""Opens the real images that samples are compared with: shipped ones, a folder, a file, or a named dataset.

What identifies them is read at once, and the images and their statistics when they are needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError, UsageError
from edadm_cli.metrics.base import NEIGHBOURS
from edadm_cli.metrics.representation import Layer, Statistics
from edadm_cli.models.digits import data as digits
from edadm_cli.models.emoji import data as emoji

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class RealImages:
    """The real images or the statistics of their features.

    Args:
        name: Name for people.
        digest: Hash of the content.
        images: Returns the images as a dataset of uint8 `(3, H, W)` for a height and a width; `None` if there are only
            statistics.
        layers: The layers (`pooled`, `spatial`) of which the statistics of the features are stored.
        statistics: Returns mean and covariance of the features of these layers.
        fetch: Makes the images available before anything is sampled: downloads them, or checks the files.
        images_name: Name of the images alone, if the statistics belong to other images.
    """

    name: str
    digest: str
    images: Callable[[tuple[int, int]], Dataset[Tensor]] | None
    layers: tuple[Layer, ...] = ()
    statistics: Callable[[], Mapping[Layer, Statistics]] = dict
    fetch: Callable[[], object] = lambda: None
    images_name: str = ""

    def without_statistics(self) -> RealImages:
        """Returns the images without the statistics, for other features than those of the statistics."""
        return replace(self, name=self.images_name or self.name, layers=(), statistics=dict)


def shipped_digits(image_size: int) -> RealImages:
    """Returns MNIST: statistics of the 60,000 training images, and the 10,000 test images.

    Raises:
        InputError: The shipped files are missing.
    """
    folder = digits.model_folder("data")
    return RealImages(
        name="MNIST (Fréchet distances: 60,000 training images; others: 10,000 test images)",
        images_name="MNIST, 10,000 test images",
        digest=_digest_of_files(folder / digits.TEST_IMAGES_FILE, folder / digits.STATISTICS_FILE),
        images=lambda size: _in_memory(digits.real_images(image_size)),
        layers=("pooled", "spatial"),
        statistics=lambda: _by_layer(digits.real_statistics(image_size)),
    )


def shipped_emoji() -> RealImages:
    """Returns the real emoji: statistics of the training pictures, and the pictures with held-out names.

    Raises:
        InputError: The shipped files are missing.
    """
    folder = emoji.model_folder("data")
    return RealImages(
        name="emoji (Fréchet distances: 18,826 training pictures; others: 967 pictures with held-out names)",
        images_name="967 emoji with held-out names",
        digest=_digest_of_files(folder / emoji.STATISTICS_FILE, folder / emoji.PICTURES_FILE),
        images=lambda size: _in_memory(emoji.real_pictures()),
        layers=("pooled", "spatial"),
        statistics=lambda: _by_layer(emoji.real_statistics()),
    )


def _in_memory(images: Tensor) -> Dataset[Tensor]:
    from edadm_cli.evaluate.real_files import ArrayImages

    return ArrayImages(images)


def _by_layer(stored: Mapping[str, Tensor]) -> dict[Layer, Statistics]:
    """Returns the statistics of a shipped file."""
    kinds: dict[Layer, str] = {"pooled": "features", "spatial": "spatial"}
    return {
        layer: Statistics(stored[f"{kind}_mean"].numpy(), stored[f"{kind}_cov"].numpy())
        for layer, kind in kinds.items()
    }


def open_real(place: str) -> RealImages:
    """Opens a folder of images, an npz file of statistics, of images, or of both, or a dataset of torch-fidelity.

    The arrays of a file are named as usual: `mu, sigma` and `mu_s, sigma_s` for mean and covariance of pooled
    and spatial features, `arr_0` for uint8 images with shape `(N, H, W, 3)`.

    Raises:
        InputError: There is no such file or folder, or it holds nothing usable.
        UsageError: The text is empty or cannot be the name of a file.
    """
    if not place.strip():
        raise UsageError("--real expects a folder, a file or the name of a dataset, and got an empty text.")
    path, is_folder, is_file = _kind_of(place)
    if is_folder:
        return _open_folder(path)
    if is_file:
        return _open_arrays(path)
    from edadm_cli.evaluate.datasets import DATASETS_REGISTRY  # imports torch-fidelity

    if place in DATASETS_REGISTRY:
        return _named_dataset(place)
    raise InputError(
        f"--real expects a folder of images, an npz file or a dataset; {path} is no such folder or file, "
        f"nor a dataset of that name ({', '.join(DATASETS_REGISTRY)})."
    )


def _kind_of(place: str) -> tuple[Path, bool, bool]:
    """Returns the path of a text, and whether it is a folder or a regular file."""
    try:
        path = Path(place).expanduser()
        return path, path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        # in this order: the text is too long, has a zero byte, or names an unknown user
        shown = place if len(place) <= 80 else f"{place[:60]}... ({len(place):,} characters)"
        raise UsageError(f"--real expects the path of a folder or a file; '{shown}' cannot be one.") from error


def _named_dataset(name: str) -> RealImages:
    """Returns a dataset of torch-fidelity, which is identified by its name and opened when it is needed."""
    from edadm_cli.evaluate.datasets import open_dataset
    from edadm_cli.evaluate.real_files import DatasetImages

    opened = cache(lambda: open_dataset(name))
    return RealImages(
        name=name,
        digest=files_digest([("torch-fidelity", name)]),
        images=lambda size: DatasetImages(opened(), size),
        fetch=opened,
    )


def _open_folder(folder: Path) -> RealImages:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(files) <= NEIGHBOURS:
        raise InputError(
            f"--real expects more than {NEIGHBOURS} images ({', '.join(IMAGE_SUFFIXES)}); {folder} holds {len(files)}."
        )

    def images(size: tuple[int, int]) -> Dataset[Tensor]:
        from edadm_cli.evaluate.real_files import FileImages

        return FileImages(files, size)

    def fetch() -> None:
        from edadm_cli.evaluate.real_files import check_headers

        check_headers(files)

    return RealImages(
        name=f"{len(files)} images in {_printable(folder.name)}",
        digest=files_digest([(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files]),
        images=images,
        fetch=fetch,
    )


def _open_arrays(path: Path) -> RealImages:
    from edadm_cli.evaluate.real_arrays import IMAGES_KEY, read_arrays  # imports numpy

    statistics, arrays = read_arrays(path)
    if not statistics and arrays is None:
        raise InputError(f"{path} holds neither statistics (mu, sigma) nor images ({IMAGES_KEY}).")

    def images(size: tuple[int, int]) -> Dataset[Tensor]:
        import torch

        return _in_memory(torch.from_numpy(arrays).permute(0, 3, 1, 2))

    return RealImages(
        name=_printable(path.name),
        digest=file_sha256(path),
        images=None if arrays is None else images,
        layers=tuple(statistics),
        statistics=lambda: statistics,
    )


def _printable(name: str) -> str:
    """Returns a file name as text, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_digest(entries: list[tuple[str, str]]) -> str:
    """Returns one hash over the names and content hashes of files."""
    digest = hashlib.sha256()
    for name, content in entries:
        digest.update(os.fsencode(name) + f"\0{content}\n".encode())
    return digest.hexdigest()


def _digest_of_files(*paths: Path) -> str:
    return files_digest([(path.name, file_sha256(path)) for path in paths])
