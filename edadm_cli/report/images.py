"""Shows images at full precision beside the quantized ones with the same seeds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from edadm_cli.artifacts import Artifact, ShownImage, explained_os_errors
from edadm_cli.report.contents import Width
from edadm_cli.report.formats import NOTHING, number
from edadm_cli.report.html import Html, Node, element

_SMALL = 128
_PNG_SIZE = slice(16, 24)


@dataclass(frozen=True)
class Picture:
    """One PNG file."""

    content: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the file's header."""
        numbers = self.content[_PNG_SIZE]
        return int.from_bytes(numbers[:4], "big"), int.from_bytes(numbers[4:], "big")

    def show(self, alt: str) -> Html:
        """Returns the image as part of the page; a small image is enlarged pixel by pixel."""
        width, height = self.size
        source = f"data:image/png;base64,{base64.b64encode(self.content).decode('ascii')}"
        return element(
            "img",
            src=source,
            alt=alt,
            width=width,
            height=height,
            loading="lazy",
            class_="pixels" if max(width, height) < _SMALL else None,
        )


@dataclass(frozen=True)
class Wall:
    """The evaluations with the same full-precision images, which are shown once."""

    shown: Sequence[ShownImage]
    full_precision: list[Picture]
    quantized: list[tuple[Width, Sequence[ShownImage], list[Picture]]]


def build_walls(widths: Sequence[Width]) -> list[Wall]:
    """Reads the shown images of every evaluation, grouped by their full-precision images."""
    walls: list[Wall] = []
    for width in widths:
        if width.evaluate is None:
            continue
        shown = width.evaluate.facts.shown
        full = _read(width.evaluate.artifact, [image.full_precision for image in shown])
        wall = next((w for w in walls if _captions(w.shown) == _captions(shown) and w.full_precision == full), None)
        if wall is None:
            wall = Wall(shown, full, [])
            walls.append(wall)
        wall.quantized.append((width, shown, _read(width.evaluate.artifact, [image.quantized for image in shown])))
    return walls


def show_wall(wall: Wall) -> Html:
    """Returns a figure for each seed: full precision, then each bit width, with the prompt below."""
    figures = [_figure(wall, place) for place in range(len(wall.shown))]
    large = any(max(picture.size) >= _SMALL for picture in wall.full_precision)
    tiles = 1 + len(wall.quantized)
    return element("div", figures, class_="wall large" if large else "wall", style=f"--tiles: {tiles}")


def _figure(wall: Wall, place: int) -> Html:
    entry = wall.shown[place]
    subject = f"\u201c{entry.prompt}\u201d" if entry.prompt is not None else f"seed {entry.seed}"
    tiles = [_tile(wall.full_precision[place], "full precision", None, f"{subject} at full precision")]
    for width, shown, pictures in wall.quantized:
        psnr = f"{number(shown[place].psnr_db, 3)}\u00a0dB"
        tiles.append(_tile(pictures[place], width.title, psnr, f"{subject} quantized to {width.title}"))
    caption: Node = entry.prompt if entry.prompt is not None else NOTHING
    text = element("bdi", caption) if entry.prompt is not None else f"seed {entry.seed}"
    return element("figure", element("div", tiles, class_="tiles"), element("figcaption", text))


def _tile(picture: Picture, label: str, note: str | None, alt: str) -> Html:
    below = element("span", label, element("small", note) if note else None, class_="label")
    return element("div", picture.show(alt), below, class_="tile")


def _read(artifact: Artifact, names: Sequence[str]) -> list[Picture]:
    pictures = []
    for name in names:
        path = artifact.file(name)
        with explained_os_errors(path):
            pictures.append(Picture(path.read_bytes()))
    return pictures


def _captions(shown: Sequence[ShownImage]) -> list[tuple[int, str | None]]:
    return [(entry.seed, entry.prompt) for entry in shown]
