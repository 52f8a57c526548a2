"""Trajectories on disk: one shard a batch, then what all shards share, merged.

While the artifact is built, each batch leaves `part-*.safetensors` (timesteps, condition, features) and then
`latents-*.safetensors`, whose presence says that the batch is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edadm_cli.artifacts import load_json, load_tensors, read_tensor_header, save_json, save_tensors
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.errors import InputError
from edadm_cli.models.calibration import CALL_FILE, CONSTANT

CONDITION_FILE = "condition.safetensors"
FEATURES_FILE = "features.safetensors"
_SHARED = ("timesteps", CONSTANT)


def latents_name(index: int) -> str:
    """File of one batch's latents."""
    return f"latents-{index:05d}.safetensors"


def part_name(index: int) -> str:
    """Scratch file of everything else of one batch."""
    return f"part-{index:05d}.safetensors"


def is_written(folder: Path, index: int) -> bool:
    """Whether a batch is done."""
    return (folder / latents_name(index)).is_file()


def write_shard(folder: Path, index: int, recorder: BatchRecorder, dtype: str) -> None:
    """Write one batch.

    Raises:
        InputError: The denoiser was called in another way than in the batches before.
    """
    call: dict[str, Any] = {"branches": recorder.branches, "dtype": dtype, "template": recorder.template}
    if (folder / CALL_FILE).is_file():
        if load_json(folder / CALL_FILE) != call:
            raise InputError(
                f"{recorder.model.ref.id}: the denoiser is called differently in batch {index} than before, "
                "so its calls cannot be put into one set.",
                hint="another --batch-size",
            )
    else:
        save_json(folder / CALL_FILE, call)
    save_tensors(folder / part_name(index), recorder.tensors())
    save_tensors(folder / latents_name(index), {"latents": torch.stack(recorder.latents)})


def merge_parts(folder: Path, num_shards: int) -> None:
    """Write `condition.safetensors` and `features.safetensors` from the parts; done already, it does nothing.

    Raises:
        InputError: Timesteps or constants differ between batches.
    """
    if (folder / FEATURES_FILE).is_file() and (folder / CONDITION_FILE).is_file():
        return
    parts = [folder / part_name(index) for index in range(num_shards)]
    names = [name for name in read_tensor_header(parts[0]) if name != "features"]
    shared = {name for name in names if name.startswith(_SHARED)}
    columns = {name: [load_tensors(part, [name])[name] for part in parts] for name in names}
    for name in shared:
        if any(not torch.equal(tensor, columns[name][0]) for tensor in columns[name]):
            raise InputError(f"'{name}' differs between batches of trajectories, which cannot be put into one set.")
    merged = {name: tensors[0] if name in shared else torch.cat(tensors) for name, tensors in columns.items()}
    timesteps = merged.pop("timesteps")
    with_features = [part for part in parts if "features" in read_tensor_header(part)]
    features = torch.cat([load_tensors(part, ["features"])["features"] for part in with_features], dim=1)
    save_tensors(folder / CONDITION_FILE, merged)
    save_tensors(folder / FEATURES_FILE, {"features": features, "timesteps": timesteps})
