"""Reads the images that condition a pipeline, which are repainted, edited, animated or followed.

The user names a folder. An image gets the file at the place that its seed gives, modulo the number of files in the
order of their names, so that neither the batch nor the other images change it. A file `NAME.mask.png` beside
`NAME.png` shows in white what an inpainting pipeline repaints. A control network gets `NAME.png` itself where the
pipeline takes no other image, and `NAME.control.png` beside it where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.pipeline_calls.output_size import picture_size
from edadm_cli.models.pipeline_calls.parameters import call_parameters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from edadm_cli.models.registry import ModelEntry

IMAGE, CONTROL, MASK = "image", "control_image", "mask_image"
IMAGE_PARAMETERS = (IMAGE, CONTROL, MASK)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MASK_ENDING, _CONTROL_ENDING = ".mask.png", ".control.png"
_MEANINGS = {MASK: "a mask that is white where it repaints", CONTROL: "the picture that its control network follows"}


def takes_images(pipeline: DiffusionPipeline) -> bool:
    """Returns whether images can condition a pipeline."""
    return not set(IMAGE_PARAMETERS).isdisjoint(call_parameters(pipeline))


def has_images(entry: ModelEntry) -> bool:
    """Returns whether a folder of images was named."""
    return entry.images is not None


def image_files(folder: Path) -> list[Path]:
    """Returns the images of a folder by name, without their masks and control images.

    Raises:
        InputError: There is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --images expects a folder with {', '.join(_SUFFIXES)} files.")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.endswith((_MASK_ENDING, _CONTROL_ENDING))]
    if not files:
        raise InputError(f"{folder} holds no images; --images expects a folder with {', '.join(_SUFFIXES)} files.")
    return files


def images_sha256(folder: Path) -> str:
    """Returns a hash over the names and contents of the images of a folder and their masks."""
    digest = sha256()
    for file in image_files(folder):
        for path in (file, _beside(file, _MASK_ENDING), _beside(file, _CONTROL_ENDING)):
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
    parameters = call_parameters(pipeline)
    names = [name for name in IMAGE_PARAMETERS if name in parameters]
    if not names:
        raise UsageError(f"{type(pipeline).__name__} takes no images, so --images has no meaning for it.")
    files = image_files(Path(entry.images))
    chosen = [files[seed % len(files)] for seed in seeds]
    size = picture_size(entry)
    endings = {MASK: _MASK_ENDING, CONTROL: _CONTROL_ENDING if IMAGE in names else ""}
    return {name: [_argument(file, endings.get(name, ""), size, name) for file in chosen] for name in names}


def _beside(file: Path, ending: str) -> Path:
    """Returns the file that belongs to an image; the image itself without an ending."""
    return file.with_name(file.stem + ending) if ending else file


def _argument(file: Path, ending: str, size: tuple[int, int] | None, name: str) -> Image:
    """Returns an image, or what lies beside it, at the size of the pipeline's pictures."""
    beside = _beside(file, ending)
    picture = _open(beside, name)
    if beside != file:
        _require_same_shape(beside, picture, file)
    return picture if size is None else picture.resize(size)


def _require_same_shape(beside: Path, picture: Image, file: Path) -> None:
    """Raises an `InputError` if a mask or a control image has other proportions than its image, to within a pixel."""
    width, height = _open(file, IMAGE).size
    if abs(picture.width * height - picture.height * width) > max(width, height, *picture.size):
        raise InputError(
            f"{beside} has {picture.width}x{picture.height} pixels, and {file.name} has {width}x{height}: it would be "
            "stretched in another way than the image that it belongs to."
        )


def _open(file: Path, name: str) -> Image:
    from PIL import Image

    if not file.is_file():
        raise InputError(f"{file} is missing: the pipeline takes '{name}' beside each image, {_MEANINGS[name]}.")
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except Exception as error:  # each of Pillow's decoders raises other kinds of errors
        raise InputError(f"{file} cannot be read as an image: {error}") from error
