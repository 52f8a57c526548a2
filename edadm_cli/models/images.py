"""Images that condition a pipeline: what is repainted, edited, animated or followed.

The user names a folder. An image gets the file at the place that its seed gives, modulo the number of files in the
order of their names, so that neither the batch nor the other images change it. A file `NAME.mask.png` beside
`NAME.png` shows in white what an inpainting pipeline repaints.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from edadm_cli.models.registry import ModelEntry

MASK = "mask_image"
IMAGE_PARAMETERS = ("image", "control_image", MASK)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MASK_ENDING = ".mask.png"


def takes_images(pipeline: DiffusionPipeline) -> bool:
    """Returns whether images can condition a pipeline."""
    return not set(IMAGE_PARAMETERS).isdisjoint(inspect.signature(type(pipeline).__call__).parameters)


def has_images(entry: ModelEntry) -> bool:
    """Returns whether a folder of images was named."""
    return entry.images is not None


def image_files(folder: Path) -> list[Path]:
    """Returns the images of a folder by name, without their masks.

    Raises:
        InputError: There is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --images expects a folder with {', '.join(_SUFFIXES)} files.")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.endswith(_MASK_ENDING)]
    if not files:
        raise InputError(f"{folder} holds no images; --images expects a folder with {', '.join(_SUFFIXES)} files.")
    return files


def images_sha256(folder: Path) -> str:
    """Returns a hash over the names and contents of the images of a folder and their masks."""
    digest = sha256()
    for file in image_files(folder):
        for path in (file, _mask_of(file)):
            if path.is_file():
                digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def image_arguments(pipeline: DiffusionPipeline, entry: ModelEntry, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call that hold images, one per seed.

    Raises:
        UsageError: Images were named, and the pipeline takes none.
        InputError: A file is missing or is no image.
    """
    if entry.images is None:
        return {}
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = [name for name in IMAGE_PARAMETERS if name in parameters]
    if not names:
        raise UsageError(f"{type(pipeline).__name__} takes no images, so --images has no meaning for it.")
    files = image_files(Path(entry.images))
    chosen = [files[seed % len(files)] for seed in seeds]
    size = entry.image_size
    return {name: [_open(_mask_of(file) if name == MASK else file, size) for file in chosen] for name in names}


def _mask_of(file: Path) -> Path:
    return file.with_name(file.stem + _MASK_ENDING)


def _open(file: Path, size: int | None) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        raise InputError(
            f"{file} is missing: an inpainting pipeline expects a mask beside each image, white where it repaints."
        )
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from error
    return image if size is None else image.resize((size, size))
