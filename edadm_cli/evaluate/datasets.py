"""The datasets that torch-fidelity knows by name, such as `cifar10-train`, as real images.

They are stored in torch-fidelity's folder and downloaded once. torchvision reads their pickles after it has compared
their hashes with the published ones.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.registry import DATASETS_REGISTRY

from edadm_cli.errors import InputError

__all__ = ["DATASETS_REGISTRY", "datasets_folder", "is_offline", "open_dataset"]


def datasets_folder() -> Path:
    """Returns the folder where torch-fidelity keeps its datasets."""
    return Path(torch.hub.get_dir()).parent / "fidelity_datasets"


def is_offline() -> bool:
    """Returns whether the environment forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def open_dataset(name: str) -> Any:
    """Returns a dataset by name, which is downloaded if needed; its items are uint8 with shape `(3, H, W)`.

    Raises:
        InputError: The dataset is missing and cannot be downloaded.
    """
    create, folder = DATASETS_REGISTRY[name], datasets_folder()
    hint = "--real DIR with the images, or an npz file of statistics"
    try:
        return create(str(folder), False)
    except (RuntimeError, OSError):  # torchvision: not found or corrupted
        if is_offline():
            raise InputError(
                f"The dataset {name} was expected in {folder} and is not there; HF_HUB_OFFLINE forbids a download.",
                hint=hint,
            ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return create(str(folder), True)
    except (RuntimeError, OSError, EOFError) as error:
        raise InputError(
            f"The dataset {name} is not in {folder} and cannot be downloaded: {' '.join(str(error).split())}.",
            hint=hint,
        ) from error
