"""Arranges full-precision images above the quantized ones with the same seeds, with their prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from edadm_cli.artifacts.files import atomic_path

MIN_TILE = 96
MAX_TILE = 256
COLUMNS = 10
_GAP = 6
_FONT_SIZE = 13
_LINE_HEIGHT = 16
_CAPTION_LINES = 3
_BACKGROUND = (255, 255, 255)
_INK = (33, 37, 41)


def to_pil(image: Tensor) -> Image.Image:
    """Returns an image of uint8 levels with shape `(3, H, W)` or `(1, H, W)` as a PIL image."""
    array = image.permute(1, 2, 0).numpy()  # [H, W, C]
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def to_tile(image: Tensor) -> Image.Image:
    """Returns an image at a convenient size: tiny ones are enlarged pixel by pixel, large ones reduced."""
    picture = to_pil(image).convert("RGB")
    longest = max(picture.size)
    if longest < MIN_TILE:
        factor = -(-MIN_TILE // longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
    return picture


def image_grid(rows: dict[str, Tensor], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Arranges sets of images as rows, so that images of the same seed are in one column.

    Args:
        rows: Maps the name of each row to its images, uint8 with shape `(N, 3, H, W)` and the same N.
        captions: One caption per image of a row, shown under its column.
        columns: Number of images side by side, after which the rows continue below.
    """
    tiles = {name: [to_tile(image) for image in images] for name, images in rows.items()}
    count = len(captions)
    if any(len(row) != count for row in tiles.values()):
        raise ValueError("Rows and captions differ in number.")
    columns = min(columns, count)
    width, height = next(iter(tiles.values()))[0].size
    font = ImageFont.load_default(_FONT_SIZE)
    margin = max(round(font.getlength(name)) for name in rows) + 2 * _GAP
    block = len(rows) * (height + _GAP) + _caption_height(captions, width) + 2 * _GAP
    num_blocks = -(-count // columns)
    picture = Image.new("RGB", (margin + columns * (width + _GAP), num_blocks * block + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for index in range(num_blocks):
        places = range(index * columns, min((index + 1) * columns, count))
        top = _GAP + index * block
        for row, (name, images) in enumerate(tiles.items()):
            y = top + row * (height + _GAP)
            draw.text((_GAP, y + height // 2), name, fill=_INK, font=font, anchor="lm")
            for place in places:
                picture.paste(images[place], (margin + (place - places.start) * (width + _GAP), y))
        y = top + len(rows) * (height + _GAP)
        for place in places:
            text = "\n".join(_caption_lines(captions[place], width))
            draw.multiline_text((margin + (place - places.start) * (width + _GAP), y), text, fill=_INK, font=font)
    return picture


def save_png(path: Path, picture: Image.Image) -> None:
    """Writes a PNG file, whole or not at all.

    Raises:
        MachineError: The disk is full or permission is denied.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _caption_lines(caption: str, width: int) -> list[str]:
    characters = max(8, int(width / (_FONT_SIZE * 0.52)))
    return textwrap.wrap(caption, characters, max_lines=_CAPTION_LINES, placeholder="…")


def _caption_height(captions: Sequence[str], width: int) -> int:
    return _LINE_HEIGHT * max(len(_caption_lines(caption, width)) for caption in captions)
