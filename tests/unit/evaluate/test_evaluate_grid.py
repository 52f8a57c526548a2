"""The picture of full-precision and quantized images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from edadm_cli.evaluate.grid import MAX_TILE, MIN_TILE, image_grid, to_tile

ImageMaker = Callable[..., torch.Tensor]


def test_tiny_images_are_enlarged_pixel_by_pixel(random_images: ImageMaker) -> None:
    image = random_images(0, 1, size=16)[0]
    tile = to_tile(image)
    factor = tile.width // 16
    assert tile.width >= MIN_TILE
    for x, y in ((0, 0), (5, 9), (15, 15)):
        level = int(image[0, y, x])
        assert tile.getpixel((x * factor, y * factor)) == (level,) * 3
        assert tile.getpixel((x * factor + factor - 1, y * factor + factor - 1)) == (level,) * 3


def test_large_images_are_reduced(random_images: ImageMaker) -> None:
    assert to_tile(random_images(1, 1, size=600, channels=3)[0]).size == (MAX_TILE, MAX_TILE)


def test_each_image_is_where_its_row_and_column_say() -> None:
    levels = torch.tensor([10, 60, 110, 160, 210], dtype=torch.uint8).view(5, 1, 1, 1)
    upper = levels.expand(5, 3, 32, 32)
    lower = (levels + 5).expand(5, 3, 32, 32)
    picture = image_grid({"full precision": upper, "w4a8": lower}, ["a"] * 5, columns=3)
    shown = {color for _, color in (picture.getcolors(1 << 20) or [])}
    assert {(int(v),) * 3 for v in (*levels.flatten(), *(levels + 5).flatten())} <= shown
    x = {int(level): _left(picture, int(level)) for level in levels.flatten()}
    assert x[10] == x[160]
    assert x[60] == x[210]
    assert x[10] < x[60] < x[110]
    assert _left(picture, 15) == x[10]
    assert _top(picture, 10) < _top(picture, 15) < _top(picture, 160)


def test_any_text_can_be_a_caption(random_images: ImageMaker) -> None:
    captions = ["<script>alert(1)</script>", "", "数字の七 " * 40, "line\nbreak \x00"]
    picture = image_grid({"full precision": random_images(2, 4), "w4a8": random_images(3, 4)}, captions)
    assert picture.height > 2 * MIN_TILE


def test_rows_of_different_length_are_refused(random_images: ImageMaker) -> None:
    with pytest.raises(ValueError, match="differ"):
        image_grid({"a": random_images(4, 2), "b": random_images(5, 3)}, ["x", "y"])


def _places(picture: object, level: int) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy((np.asarray(picture) == level).all(-1)).nonzero()


def _left(picture: object, level: int) -> int:
    return int(_places(picture, level)[:, 1].min())


def _top(picture: object, level: int) -> int:
    return int(_places(picture, level)[:, 0].min())
