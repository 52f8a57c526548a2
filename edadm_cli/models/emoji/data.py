"""Provides what the emoji models are measured on: the shipped files, names, prompts and real pictures."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.emoji.captions import STYLES, prompt_of
from edadm_cli.models.real_statistics import unpack

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"
PIPELINES = ("emoji-sd", "emoji-dit")
STATISTICS_FILE = "statistics.safetensors"
NAMES_FILE = "names.json.gz"
PICTURES_FILE = "held_out.webp"
TRAIN_COMMAND = "python -m edadm_cli.models.emoji.train --help"
_SHARED = {
    "emoji-sd": {"vae": "vae", "text_encoder": "text_encoder", "tokenizer": "tokenizer"},
    "emoji-dit": {
        "vae": "vae",
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder",
        "tokenizer": "tokenizer",
        "tokenizer_2": "tokenizer",
    },
}
_PICTURE_SIZE = 64


def model_folder(name: str, root: Path = WEIGHTS) -> Path:
    """Returns the folder of a shipped pipeline, of the `shared` components or of the real `data`.

    Raises:
        UsageError: There is no such model.
        InputError: Its files are missing.
    """
    if name not in (*PIPELINES, "shared", "data"):
        raise UsageError(f"An emoji model is one of {', '.join(PIPELINES)}, found {name!r}.")
    folder = root / name
    if not folder.is_dir():
        raise InputError(f"The files of {name} belong in {folder}, which is missing.", hint=TRAIN_COMMAND)
    return folder


def shared_parts(folder: Path) -> dict[str, Path]:
    """Returns the folder of each component that a pipeline shares with the other one, by component name."""
    return {part: folder.parent / "shared" / place for part, place in _SHARED.get(folder.name, {}).items()}


@cache
def names(root: Path = WEIGHTS) -> dict[str, Any]:
    """Returns the names of the pictures.

    Returns:
        A dictionary with four entries. `by_style` holds the names that each style has. `held_out` holds the names that
        training leaves out, and `held_out_pictures` the number of their pictures. `retrieval` holds the 500 names among
        which a picture's name is retrieved.
    """
    content: dict[str, Any] = json.loads(gzip.decompress((model_folder("data", root) / NAMES_FILE).read_bytes()))
    return content


def prompts(num_prompts: int, seed: int) -> list[str]:
    """Returns `num_prompts` prompts, each for one of the 500 retrieval names in a style that has the name.

    The order is seeded. A longer list with the same seed starts with the shorter one, so that an evaluation with the
    seed of a collection begins with the prompts of its trajectories. No prompt is repeated before all prompts have
    occurred once.
    """
    if num_prompts < 0:
        raise UsageError(f"The number of prompts is 0 or more, found {num_prompts}.")
    known = names()
    retrieval = set(known["retrieval"])
    pairs = [(name, style) for style in STYLES.values() for name in known["by_style"][style] if name in retrieval]
    generator = random.Random(f"emoji prompts {seed}")
    chosen: list[str] = []
    while len(chosen) < num_prompts:
        chosen += [prompt_of(*pair) for pair in generator.sample(pairs, len(pairs))]
    return chosen[:num_prompts]


def label_of_prompt(prompt: str) -> int | None:
    """Returns the index of the retrieval name that a prompt asks for; `None` if it asks for none of them.

    The longest name that the prompt contains as whole words counts, so that `woman teacher` is not `teacher`.
    """
    text = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    matches = [(len(name), number) for number, name in enumerate(names()["retrieval"]) if f" {name} " in text]
    return max(matches)[1] if matches else None


def real_statistics(root: Path = WEIGHTS) -> dict[str, Tensor]:
    """Returns the mean and covariance of the encoder's features over the training pictures.

    Returns:
        `features_mean (160,)`, `features_cov (160, 160)`, `spatial_mean (256,)`, `spatial_cov (256, 256)` in float64.
    """
    from safetensors.torch import load_file

    return unpack(load_file(model_folder("data", root) / STATISTICS_FILE))


def real_pictures(root: Path = WEIGHTS) -> Tensor:
    """Returns the pictures whose names are held out of training, as uint8 with shape `(N, 3, 64, 64)`."""
    import numpy
    import torch
    from PIL import Image

    with Image.open(model_folder("data", root) / PICTURES_FILE) as image:
        sheet = torch.from_numpy(numpy.array(image.convert("RGB")))
    rows, columns = sheet.shape[0] // _PICTURE_SIZE, sheet.shape[1] // _PICTURE_SIZE
    tiles = sheet.view(rows, _PICTURE_SIZE, columns, _PICTURE_SIZE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * columns, 3, _PICTURE_SIZE, _PICTURE_SIZE)[
        : names(root)["held_out_pictures"]
    ].contiguous()
