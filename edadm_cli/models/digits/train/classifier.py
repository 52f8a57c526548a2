"""Trains the digit classifier, and writes the files of the real data that depend on it."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from edadm_cli.models.digits.classifier import DigitClassifier, load_classifier
from edadm_cli.models.digits.data import (
    CLASSIFIER_FILE,
    IMAGE_SIZES,
    STATISTICS_FILE,
    TEST_IMAGES_FILE,
    to_image_format,
)
from edadm_cli.models.digits.train.corpus import Corpus
from edadm_cli.models.digits.train.loop import Schedule, discard_checkpoint, fit
from edadm_cli.models.digits.train.measure import classify, feature_statistics, frechet_distances
from edadm_cli.models.digits.train.record import is_trained, write_json, write_record
from edadm_cli.models.digits.train.settings import TrainSettings
from edadm_cli.models.real_statistics import pack

NAME = "classifier"
SCHEDULE = Schedule(epochs=30, batch_size=256, learning_rate=3e-3, warmup_steps=200)
_SMALL_FORMAT_SHARE = 0.3
_LABEL_SMOOTHING = 0.05


class ClassifierTask:
    """Minimises the cross entropy on shifted, rotated, scaled and (for the 16x16 format) coarsened images."""

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        self.module = DigitClassifier().to(settings.device)
        self._images = to_image_format(corpus.train_images, 32).to(settings.device)
        self._labels = corpus.train_labels.to(settings.device)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns augmented images `(B, 1, 32, 32)` and labels `(B,)`."""
        images = self._images[index].float() / 255
        images = functional.grid_sample(images, _random_grid(len(index), generator), align_corners=False)
        coarse = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        chance = torch.rand(len(index), 1, 1, 1, generator=generator, device=generator.device)
        return torch.where(chance < _SMALL_FORMAT_SHARE, coarse, images), self._labels[index]

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the cross entropy."""
        images, labels = inputs
        return functional.cross_entropy(self.module(images).logits, labels, label_smoothing=_LABEL_SMOOTHING)


def _random_grid(num: int, generator: torch.Generator) -> Tensor:
    """Draws sampling grids that rotate by up to 12 degrees, scale by 0.9 to 1.1 and shift by up to 2.5 pixels."""
    device = generator.device
    angle, scale, shift_x, shift_y = torch.rand(4, num, generator=generator, device=device) * 2 - 1
    angle, scale = angle * 0.21, 1 + 0.1 * scale
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cosine, -sine, shift_x * 0.16, sine, cosine, shift_y * 0.16], dim=1)
    return functional.affine_grid(rows.view(num, 2, 3), [num, 1, 32, 32], align_corners=False)


def train_classifier(corpus: Corpus, settings: TrainSettings) -> None:
    """Trains the classifier, then writes the test images and the statistics of the training images."""
    folder = settings.weights / NAME
    if is_trained(folder, settings, corpus):
        return
    torch.manual_seed(settings.seed)
    task = ClassifierTask(corpus, settings)
    schedule = dataclasses.replace(SCHEDULE, epochs=SCHEDULE.epochs * settings.epochs_scale)
    fitted = fit(task, schedule, len(corpus.train_images), settings, NAME)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in task.module.state_dict().items()}
    save_file(state, folder / CLASSIFIER_FILE)
    _write_real_data(corpus, settings)
    measurements = measure_classifier(corpus, settings)
    write_record(folder, settings, corpus, schedule, fitted, {NAME: task.module}, measurements)
    discard_checkpoint(settings, NAME)


def measure_classifier(corpus: Corpus, settings: TrainSettings) -> dict[str, Any]:
    """Returns the accuracy of the stored weights on the test images in both formats."""
    classifier = load_classifier(settings.device, settings.weights)
    accuracy: dict[str, float] = {}
    for size in IMAGE_SIZES:
        predicted = classify(classifier, to_image_format(corpus.test_images, size)).argmax(dim=1)
        accuracy[f"{size}x{size}"] = (predicted == corpus.test_labels).double().mean().item()
    return {"test_accuracy": accuracy}


def _write_arrays(path: Path, **arrays: NDArray[numpy.uint8]) -> None:
    """Writes an npz file that `numpy.load` reads, packed with LZMA, which is a sixth smaller than what numpy writes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            numpy.save(content, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_LZMA)


def _write_real_data(corpus: Corpus, settings: TrainSettings) -> None:
    folder = settings.weights / "data"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = corpus.test_images.numpy(), corpus.test_labels.to(torch.uint8).numpy()
    _write_arrays(folder / TEST_IMAGES_FILE, images=images, labels=labels)
    classifier = load_classifier(settings.device, settings.weights)
    packed: dict[str, Tensor] = {}
    floor: dict[str, Any] = {}
    for size in IMAGE_SIZES:
        real = feature_statistics(classifier, to_image_format(corpus.train_images, size))
        packed |= pack(real, f"{size}.")
        unseen = feature_statistics(classifier, to_image_format(corpus.test_images, size))
        floor[f"{size}x{size}"] = frechet_distances(real, unseen)
    save_file(packed, folder / STATISTICS_FILE)
    content = {
        "source_sha256": corpus.sha256,
        "num_train": len(corpus.train_images),
        "num_test": len(corpus.test_images),
        "distance_of_test_to_train": floor,
    }
    write_json(folder / "data.json", content)
