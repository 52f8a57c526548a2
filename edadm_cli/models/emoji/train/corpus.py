"""Loads the pictures as pixels, with their names and with their captions as tokens."""

from __future__ import annotations

import io
import json
import lzma
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from edadm_cli.models.emoji.captions import STYLED_TEMPLATES, STYLES
from edadm_cli.models.emoji.train.prepare import INDEX, PICTURES, TOKENS
from edadm_cli.models.emoji.train.settings import TrainSettings

IMAGE_SIZE = 64
_CHUNK = 32


@dataclass(frozen=True)
class Pictures:
    """Holds the pictures, which are all that `ddpm-emoji` learns from.

    Attributes:
        pixels: The pictures, uint8, with shape `(N, 3, S, S)`, on the run's device. S is 64, or 32 in a packed file.
        train: The indices of the training pictures.
        held_out: The indices of the pictures whose names are held out.
    """

    pixels: Tensor
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Corpus(Pictures):
    """Holds the pictures of 64x64 pixels and their captions.

    Attributes:
        tokens: The tokens of the captions, int64, with shape `(N, captions, 24)`, on the run's device. Captions that
            name the style come first.
        empty: The tokens of the empty caption, with shape `(24,)`.
        names: The name of each picture.
        styles: The style word of each picture.
        name_number: The index of each picture's name, with shape `(N,)`.
        style_number: The index of each picture's style, with shape `(N,)`.
    """

    tokens: Tensor
    empty: Tensor
    names: list[str]
    styles: list[str]
    name_number: Tensor
    style_number: Tensor

    @property
    def num_styled(self) -> int:
        """Returns the number of a picture's captions that name its style."""
        return len(STYLED_TEMPLATES)


def rasterise(svg: str) -> numpy.ndarray:
    """Returns an SVG text as uint8 pixels `(64, 64, 3)` on white, rendered at twice the size and averaged over 2x2."""
    import resvg_py

    size = 2 * IMAGE_SIZE
    png = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True)
    )
    image = Image.open(io.BytesIO(png)).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return numpy.asarray(image)


def pixels_of(data: Path, cache: Path, limit: int | None, processes: int) -> numpy.ndarray:
    """Returns all pictures as uint8 `(N, 64, 64, 3)`. They are rasterised once and then kept in the folder `cache`."""
    path = cache / f"pixels-{limit or 'all'}.npy"
    if path.is_file():
        return numpy.load(path)
    svgs = json.loads(lzma.decompress((data / PICTURES).read_bytes()))
    svgs = svgs if limit is None else [svgs[i] for i in _spread(len(svgs), limit)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pixels = numpy.stack(list(pool.imap(rasterise, svgs, chunksize=_CHUNK)))
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    numpy.save(partial, pixels)
    partial.replace(path)
    return pixels


def _spread(count: int, limit: int) -> list[int]:
    return [i * count // limit for i in range(limit)]


def load_corpus(settings: TrainSettings, processes: int = 1) -> Corpus:
    """Loads the prepared data onto the run's device."""
    index = json.loads((settings.data / INDEX).read_text())
    arrays = numpy.load(settings.data / TOKENS, allow_pickle=False)
    pixels = pixels_of(settings.data, settings.out / "cache", settings.limit, processes)
    rows = list(range(len(index["names"]))) if settings.limit is None else _spread(len(index["names"]), settings.limit)
    names = [index["names"][i] for i in rows]
    sets = [index["sets"][i] for i in rows]
    held_out = set(index["held_out"])
    known = {name: number for number, name in enumerate(sorted(set(names)))}
    is_held_out = torch.tensor([name in held_out for name in names])
    device = settings.device
    return Corpus(
        pixels=torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous(),
        tokens=torch.from_numpy(arrays["captions"][rows].astype(numpy.int64)).to(device),
        empty=torch.from_numpy(arrays["empty"].astype(numpy.int64)).to(device),
        names=names,
        styles=[STYLES[name] for name in sets],
        name_number=torch.tensor([known[name] for name in names], device=device),
        style_number=torch.tensor([list(STYLES).index(name) for name in sets], device=device),
        train=torch.nonzero(~is_held_out).flatten().to(device),
        held_out=torch.nonzero(is_held_out).flatten().to(device),
    )


def draw_captions(
    corpus: Corpus, index: Tensor, empty_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the tokens `(B, 24)` of one random caption per picture, and whether each caption names a style.

    Three quarters of the captions name the style. Then a share `empty_share` of all is replaced by the empty caption.
    """
    device, count = index.device, len(index)
    styled = torch.rand(count, generator=generator, device=device) < 0.75
    num_plain = corpus.tokens.shape[1] - corpus.num_styled
    with_style = torch.randint(corpus.num_styled, (count,), generator=generator, device=device)
    without = corpus.num_styled + torch.randint(num_plain, (count,), generator=generator, device=device)
    tokens = corpus.tokens[index, torch.where(styled, with_style, without)]
    empty = torch.rand(count, generator=generator, device=device) < empty_share
    return torch.where(empty[:, None], corpus.empty, tokens), styled
