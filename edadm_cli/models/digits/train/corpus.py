"""The MNIST images that the models are trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from edadm_cli.errors import InputError

_WANTED = "x_train [60000, 28, 28], y_train [60000], x_test [10000, 28, 28], y_test [10000], all uint8"


@dataclass(frozen=True)
class Corpus:
    """Holds MNIST: uint8 images with shape `(N, 28, 28)`, int64 labels with shape `(N,)`, and the file's sha256."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    sha256: str


def load_corpus(path: Path) -> Corpus:
    """Reads MNIST from an `.npz` file with the arrays `x_train, y_train, x_test, y_test`.

    Raises:
        InputError: The file is missing or is not MNIST.
    """
    hint = f"--data FILE.npz with {_WANTED}"
    if not path.is_file():
        raise InputError(f"MNIST as an .npz file was expected at {path}, but there is no file.", hint=hint)
    with numpy.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for split, count in (("train", 60_000), ("test", 10_000)):
        for name, shape in ((f"x_{split}", (count, 28, 28)), (f"y_{split}", (count,))):
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != numpy.uint8:
                raise InputError(
                    f"{name} {shape} of uint8 was expected in {path}, which holds something else.", hint=hint
                )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Corpus(
        tensors["x_train"], tensors["y_train"].long(), tensors["x_test"], tensors["y_test"].long(),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
