r"""Provides what the digits models are trained and measured on: image formats, captions, and the shipped files.

The two image formats come from the 28x28 MNIST images:

- 32x32: two pixels of zeros on each side (`digits-sd`),
- 16x16: the mean over 2x2 pixels of the 32x32 format (`digits-ddpm`).

Both are kept as 8-bit gray levels, which is what image metrics compare.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.real_statistics import unpack

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZES = (16, 32)
WEIGHTS = Path(__file__).parent / "weights"
MODEL_NAMES = ("classifier", "digits-sd", "digits-ddpm", "data")
CLASSIFIER_FILE = "classifier.safetensors"
TEST_IMAGES_FILE = "mnist_test.npz"
STATISTICS_FILE = "statistics.safetensors"
TRAIN_COMMAND = "python -m edadm_cli.models.digits.train --data mnist.npz --out DIR"

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "handwritten digit {}",
    "a handwritten digit {}",
    "a handwritten number {}",
    "a picture of the number {}",
    "a picture of the digit {}",
    "an image of a handwritten {}",
    "a drawing of the number {}",
    "the number {} written by hand",
)


def captions_of(digit: int) -> tuple[str, ...]:
    """Returns every caption of a digit: each template with the digit's word, then each template with its numeral."""
    names = (DIGIT_WORDS[digit], str(digit))
    return tuple(template.format(name) for name in names for template in TEMPLATES)


def label_of_prompt(prompt: str) -> int | None:
    """Returns the digit that a prompt asks for; `None` if it names none or several.

    A digit may be a word, in upper or lower case, or a numeral that stands alone; `17` names no single digit.
    """
    names = {name: digit for digit, word in enumerate(DIGIT_WORDS) for name in (word, str(digit))}
    digits = {names[part] for part in re.findall(r"[^\W\d_]+|\d+", prompt.lower()) if part in names}
    return digits.pop() if len(digits) == 1 else None


def prompts(num_prompts: int, seed: int) -> list[str]:
    """Returns `num_prompts` captions in which every digit occurs equally often, to within one.

    The same holds for the captions of each digit. Prompts 0 to 9, 10 to 19 and so on name each digit once, in a seeded
    order. A longer list with the same seed starts with the shorter one, and 240 prompts hold every caption once.

    Raises:
        UsageError: `num_prompts` is negative.
    """
    if num_prompts < 0:
        raise UsageError(f"A number of prompts of 0 or more was expected, got {num_prompts}.")
    captions = [_endless_shuffle(captions_of(digit), seed, digit) for digit in range(10)]
    order = random.Random(f"digits prompts {seed} order")
    chosen: list[str] = []
    while len(chosen) < num_prompts:
        chosen += [next(captions[digit]) for digit in order.sample(range(10), 10)]
    return chosen[:num_prompts]


def _endless_shuffle(captions: tuple[str, ...], seed: int, digit: int) -> Iterator[str]:
    generator = random.Random(f"digits prompts {seed} digit {digit}")
    while True:
        yield from generator.sample(captions, len(captions))


def to_image_format(images: Tensor, image_size: int) -> Tensor:
    """Returns MNIST images `(N, 28, 28)` as 8-bit gray images with shape `(N, 1, S, S)`, S being `image_size`.

    Raises:
        UsageError: `image_size` is neither 16 nor 32.
    """
    from torch.nn import functional

    _check_image_size(image_size)
    padded = functional.pad(images.unsqueeze(1), (2, 2, 2, 2))  # [N, 1, 32, 32]
    if image_size == 32:
        return padded
    return functional.avg_pool2d(padded.float(), 2).round().to(images.dtype)


def model_folder(name: str, root: Path = WEIGHTS) -> Path:
    """Returns the folder of a shipped model, of the classifier or of the real data.

    Raises:
        UsageError: There is no model of this name.
        InputError: Its files are missing.
    """
    if name not in MODEL_NAMES:
        raise UsageError(f"A digits model was expected ({', '.join(MODEL_NAMES)}), got {name!r}.")
    folder = root / name
    if not folder.is_dir():
        raise InputError(f"The files of {name} were expected in {folder}, but there are none.", hint=TRAIN_COMMAND)
    return folder


def real_images(image_size: int, root: Path = WEIGHTS) -> Tensor:
    """Returns the 10,000 MNIST test images as uint8 with shape `(10000, 1, S, S)`."""
    return to_image_format(_read_test_array("images", root), image_size)


def real_labels(root: Path = WEIGHTS) -> Tensor:
    """Returns the labels of the MNIST test images as int64 with shape `(10000,)`."""
    return _read_test_array("labels", root).long()


def real_statistics(image_size: int, root: Path = WEIGHTS) -> dict[str, Tensor]:
    """Returns the mean and covariance of the classifier's features over the 60,000 MNIST training images.

    Returns:
        `features_mean (D,)`, `features_cov (D, D)`, `spatial_mean (E,)`, `spatial_cov (E, E)` in float64;
        `spatial` is the flattened early feature map.
    """
    from safetensors.torch import load_file

    _check_image_size(image_size)
    return unpack(load_file(model_folder("data", root) / STATISTICS_FILE), f"{image_size}.")


def _check_image_size(image_size: int) -> None:
    if image_size not in IMAGE_SIZES:
        raise UsageError(f"An image size of 16 or 32 was expected, got {image_size}.")


def _read_test_array(name: str, root: Path) -> Tensor:
    import numpy
    import torch

    with numpy.load(model_folder("data", root) / TEST_IMAGES_FILE, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays[name])
