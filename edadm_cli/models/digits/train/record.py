"""Reads and writes the training record beside each model's weights.

A record says what was trained, on which data, for how long and with which results.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.digits.train.corpus import Corpus
from edadm_cli.models.digits.train.loop import FitResult, Schedule
from edadm_cli.models.digits.train.settings import TrainSettings

RECORD_FILE = "training.json"
_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy")


def identity_of(settings: TrainSettings, corpus: Corpus) -> dict[str, Any]:
    """Returns what decides the outcome of a stage, apart from the code and the machine."""
    return {"data_sha256": corpus.sha256, "seed": settings.seed, "epochs_scale": settings.epochs_scale}


def is_trained(folder: Path, settings: TrainSettings, corpus: Corpus) -> bool:
    """Returns whether a stage is finished with these settings.

    Raises:
        InputError: It is finished with other settings, and `--force` is not given.
    """
    path = folder / RECORD_FILE
    if settings.force or not path.is_file():
        return False
    recorded, expected = read_record(folder)["identity"], identity_of(settings, corpus)
    if recorded != expected:
        raise InputError(f"{folder} was expected with {expected}; it has {recorded}.", hint="add --force")
    return True


def read_record(folder: Path) -> dict[str, Any]:
    """Reads a training record."""
    record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text())
    return record


def write_record(
    folder: Path,
    settings: TrainSettings,
    corpus: Corpus,
    schedule: Schedule,
    fitted: FitResult,
    modules: dict[str, nn.Module],
    measurements: dict[str, Any],
) -> None:
    """Writes a stage's record. This comes last, because the presence of a record means that the stage is finished."""
    record = {
        "identity": identity_of(settings, corpus),
        "data": {
            "sha256": corpus.sha256,
            "num_train": len(corpus.train_images),
            "num_test": len(corpus.test_images),
        },
        "schedule": asdict(schedule),
        "steps": fitted.steps,
        "final_loss": fitted.final_loss,
        "seconds": round(fitted.seconds, 1),
        "parameters": {name: sum(value.numel() for value in module.parameters()) for name, module in modules.items()},
        "machine": machine(settings.device),
        "versions": {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "measurements": measurements,
    }
    write_json(folder / RECORD_FILE, record)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file beside its final path, and then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def machine(device: torch.device) -> str:
    """Returns the name of the device that a record was made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
