"""Trajectories on disk: one shard a batch, then what all shards share, merged.

While the artifact is built, each batch leaves `call-*.json`, `part-*.safetensors` (timesteps, condition, features) and
then `latents-*.safetensors`, whose presence says that the batch is done. No batch reads what another wrote, so that
several processes can write them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edadm_cli.artifacts import load_tensors, read_model, read_tensor_header, save_json, save_tensors
from edadm_cli.artifacts.streaming import joined, stream_tensors, whole
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.errors import InputError
from edadm_cli.models.calibration import CONSTANT, CallForm

CONDITION_FILE = "condition.safetensors"
FEATURES_FILE = "features.safetensors"
_SHARED = ("timesteps", CONSTANT)


def latents_name(index: int) -> str:
    """File of one batch's latents."""
    return f"latents-{index:05d}.safetensors"


def part_name(index: int) -> str:
    """Scratch file of everything else of one batch."""
    return f"part-{index:05d}.safetensors"


def call_name(index: int) -> str:
    """Scratch file of how the denoiser is called in one batch."""
    return f"call-{index:05d}.json"


def is_written(folder: Path, index: int) -> bool:
    """Whether a batch is done."""
    return (folder / latents_name(index)).is_file()


def scratch_names(index: int) -> tuple[str, str]:
    """Files of one batch that are gone once the artifact is complete."""
    return part_name(index), call_name(index)


def write_shard(folder: Path, index: int, recorder: BatchRecorder, dtype: str) -> None:
    """Write one batch."""
    form = CallForm.model_validate({"branches": recorder.branches, "dtype": dtype, "template": recorder.template})
    save_json(folder / call_name(index), form.model_dump(mode="json"))
    save_tensors(folder / part_name(index), recorder.tensors())
    save_tensors(folder / latents_name(index), {"latents": torch.stack(recorder.latents)})


def merge_parts(folder: Path, num_shards: int) -> None:
    """Write `call.json`, `condition.safetensors` and `features.safetensors` from the parts, unless they are there.

    The parts are copied piece by piece: neither the conditions nor the features of all batches are ever in memory.

    Raises:
        InputError: Timesteps, constants or the form of the denoiser's calls differ between batches.
    """
    if all((folder / name).is_file() for name in (CallForm.FILE, CONDITION_FILE, FEATURES_FILE)):
        return
    parts = [folder / part_name(index) for index in range(num_shards)]
    call = read_model(folder / call_name(0), CallForm)
    for index in range(num_shards):
        if read_model(folder / call_name(index), CallForm) != call:
            raise InputError(
                f"The denoiser is called differently in batch {index} than before, so its calls cannot be put into "
                "one set.",
                hint="another --batch-size",
            )
    names = [name for name in read_tensor_header(parts[0]) if name != "features"]
    shared = [name for name in names if name.startswith(_SHARED)]
    first = load_tensors(parts[0], shared)
    for part in parts[1:]:
        for name, tensor in load_tensors(part, shared).items():
            if not torch.equal(tensor, first[name]):
                raise InputError(f"'{name}' differs between batches of trajectories, which cannot be put into one set.")
    timesteps = first.pop("timesteps")
    condition = {name: joined(parts, name, 0) for name in names if name not in shared}
    stream_tensors(folder / CONDITION_FILE, {**condition, **{name: whole(tensor) for name, tensor in first.items()}})
    with_features = [part for part in parts if "features" in read_tensor_header(part)]
    features = joined(with_features, "features", 1)
    stream_tensors(folder / FEATURES_FILE, {"features": features, "timesteps": whole(timesteps)})
    call.save(folder)
