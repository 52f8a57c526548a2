"""Writes and reads the file of small pictures from which `ddpm-emoji` is trained without an archive or a rasteriser.

The file is an `.npz` of numpy. It holds `sheets`, the bytes of lossless WebP files with four pictures of 32x32 pixels
per row, one file after the other; `lengths`, their sizes in bytes; `held_out`, whether the name of each picture is held
out of training; and `card`, the data card with the sources and licences of the pictures.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from edadm_cli.errors import InputError
from edadm_cli.models.emoji.train.corpus import Pictures
from edadm_cli.models.emoji.train.settings import TrainSettings

SMALL_SIZE = 32
_COLUMNS = 4  # in a narrow sheet pictures of one style lie near each other, which makes the file smaller
_PER_SHEET = 511 * _COLUMNS  # a WebP picture has at most 16,383 rows


def small_pictures(pixels: Tensor) -> Tensor:
    """Returns uint8 pictures `(N, 3, 32, 32)`: means over 2x2 pixels, or what is given if it has that size."""
    if pixels.shape[-1] == SMALL_SIZE:
        return pixels
    return torch.cat([functional.avg_pool2d(part.float(), 2).round().to(torch.uint8) for part in pixels.split(2000)])


def pack(pictures: Pictures, card: bytes, path: Path) -> None:
    """Writes all pictures at 32x32 pixels, without loss, and the data card.

    Args:
        pictures: The pictures.
        card: The content of `card.json`.
        path: The file.
    """
    small = small_pictures(pictures.pixels.cpu())
    held_out = numpy.zeros(len(small), dtype=bool)
    held_out[pictures.held_out.cpu().numpy()] = True
    sheets = [_sheet(part) for part in small.split(_PER_SHEET)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        numpy.savez(
            file,
            sheets=numpy.concatenate(sheets),
            lengths=numpy.array([len(sheet) for sheet in sheets]),
            held_out=held_out,
            card=numpy.frombuffer(card, dtype=numpy.uint8),
        )
    partial.replace(path)


def _sheet(pixels: Tensor) -> numpy.ndarray:
    rows = -(-len(pixels) // _COLUMNS)
    tiles = numpy.full((rows * _COLUMNS, SMALL_SIZE, SMALL_SIZE, 3), 255, dtype=numpy.uint8)
    tiles[: len(pixels)] = pixels.permute(0, 2, 3, 1).numpy()
    sheet = tiles.reshape(rows, _COLUMNS, SMALL_SIZE, SMALL_SIZE, 3).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    image = Image.fromarray(sheet.reshape(rows * SMALL_SIZE, _COLUMNS * SMALL_SIZE, 3))
    image.save(file, "webp", lossless=True, quality=100, method=6)
    return numpy.frombuffer(file.getvalue(), dtype=numpy.uint8)


def _pixels(sheet: numpy.ndarray) -> Tensor:
    with Image.open(io.BytesIO(sheet.tobytes()), formats=["WEBP"]) as image:
        pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    rows = pixels.shape[0] // SMALL_SIZE
    tiles = pixels.view(rows, SMALL_SIZE, _COLUMNS, SMALL_SIZE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * _COLUMNS, 3, SMALL_SIZE, SMALL_SIZE)


def load_packed(settings: TrainSettings) -> Pictures:
    """Loads the file `settings.data` onto the run's device; `settings.limit` takes some pictures, evenly spread.

    Raises:
        InputError: It is not such a file.
    """
    try:
        with numpy.load(settings.data, allow_pickle=False) as arrays:
            held_out = torch.from_numpy(arrays["held_out"])
            count = len(held_out)
            sheets = numpy.split(arrays["sheets"], numpy.cumsum(arrays["lengths"])[:-1])
        pixels = torch.cat([_pixels(sheet) for sheet in sheets])[:count]
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{settings.data} is no file of packed pictures.",
            hint="python -m edadm_cli.models.emoji.train pixels --data PREPARED --out OUT --pack FILE",
        ) from error
    if settings.limit is not None:
        chosen = torch.arange(settings.limit) * count // settings.limit
        pixels, held_out = pixels[chosen], held_out[chosen]
    device = settings.device
    return Pictures(
        pixels=pixels.to(device),
        train=torch.nonzero(~held_out).flatten().to(device),
        held_out=torch.nonzero(held_out).flatten().to(device),
    )
