"""Stores trajectories on disk: one shard per batch, and the merged tensors of all shards.

While the artifact is built, each batch writes `call-*.json`, `part-*.safetensors` (timesteps, condition, features) and
finally `latents-*.safetensors`, which shows that the batch is complete. No batch reads the files of another one, so
that several processes can write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from edadm_cli.artifacts import TensorInfo, load_tensors, read_model, save_json, save_tensors
from edadm_cli.artifacts.streaming import Streamed, joined, padded, stream_tensors, streamed, torch_type
from edadm_cli.collect.merging import Batch, Merged, merge
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.models.collected import (
    CONDITION,
    CONDITION_FILE,
    CONSTANT,
    FEATURES,
    FEATURES_FILE,
    TIMESTEPS,
    UNCONDITIONAL,
)
from edadm_cli.models.denoiser_calls.calibration import CallForm
from edadm_cli.models.denoiser_calls.call_templates import per_row


def latents_name(index: int) -> str:
    """Returns the name of the file with the latents of one batch."""
    return f"latents-{index:05d}.safetensors"


def part_name(index: int) -> str:
    """Returns the name of the scratch file with all other tensors of one batch."""
    return f"part-{index:05d}.safetensors"


def call_name(index: int) -> str:
    """Returns the name of the scratch file that says how the denoiser is called in one batch."""
    return f"call-{index:05d}.json"


def is_written(folder: Path, index: int) -> bool:
    """Returns whether a batch is complete on disk."""
    return (folder / latents_name(index)).is_file()


def scratch_names(index: int) -> tuple[str, str]:
    """Returns the files of one batch that are removed when the artifact is complete."""
    return part_name(index), call_name(index)


def write_shard(folder: Path, index: int, recorder: BatchRecorder, dtype: str) -> None:
    """Writes the recording of one batch; the file of the latents is the last one.

    Args:
        folder: The denoiser's folder in the artifact.
        index: The number of the batch.
        recorder: The recording.
        dtype: The name of the element type that the denoiser computed in.
    """
    template = per_row(recorder.template, recorder.rows)
    control = recorder.control_form()
    if control is not None:
        control["template"] = per_row(control["template"], recorder.rows)
    fields = {"branches": recorder.branches, "dtype": dtype, "template": template, "control": control}
    fields["varying"] = sorted(recorder.varying.values)
    form = CallForm.model_validate(fields)
    save_json(folder / call_name(index), form.model_dump(mode="json"))
    save_tensors(folder / part_name(index), recorder.tensors())
    save_tensors(folder / latents_name(index), {"latents": torch.stack(recorder.latents)})


def require_mergeable(folder: Path, first: int, index: int) -> None:
    """Compares two batches on disk, so that batches that cannot be merged are refused before others are sampled.

    Nothing is compared after the merge, which removes the scratch files.

    Raises:
        InputError: The batches cannot be merged.
    """
    if all((folder / part_name(number)).is_file() for number in (first, index)):
        merge([_batch(folder, first), _batch(folder, index)])


def merge_parts(folder: Path, num_shards: int) -> None:
    """Writes `call.json`, `condition.safetensors` and `features.safetensors` from the parts, unless they exist.

    The parts are copied piece by piece, so that the conditions or features of all batches are never in memory at once.

    Raises:
        InputError: The batches cannot be merged.
    """
    if all((folder / name).is_file() for name in (CallForm.FILE, CONDITION_FILE, FEATURES_FILE)):
        return
    batches = [_batch(folder, index) for index in range(num_shards)]
    merged = merge(batches)
    streams = {
        prefix + name: _joined(batches, prefix, name, merged)
        for prefix in (CONDITION, UNCONDITIONAL)[: merged.form.branches]
        for name in merged.conditions
    }
    constants = [CONSTANT + name for name in merged.form.constants]
    streams |= {name: streamed(tensor) for name, tensor in load_tensors(batches[0].path, constants).items()}
    stream_tensors(folder / CONDITION_FILE, streams)
    featured = [batch.path for batch in batches if FEATURES in batch.tensors]
    features = joined(featured, FEATURES, 1, merged.features.shape)
    timesteps = load_tensors(batches[0].path, [TIMESTEPS])[TIMESTEPS]
    stream_tensors(folder / FEATURES_FILE, {FEATURES: features, TIMESTEPS: streamed(timesteps)})
    merged.form.save(folder)


def _batch(folder: Path, index: int) -> Batch:
    return Batch.open(read_model(folder / call_name(index), CallForm), folder / part_name(index), index)


def _joined(batches: Sequence[Batch], prefix: str, name: str, merged: Merged) -> Streamed:
    """Returns a condition of all batches, padded with zeros; a mask that a batch lacks is ones over its states."""
    info, paths = merged.conditions[name], [batch.path for batch in batches]
    if name not in merged.masks:
        return joined(paths, prefix + name, 0, info.shape)

    def pieces() -> Iterator[torch.Tensor]:
        for batch in batches:
            if prefix + name in batch.tensors:
                yield padded(load_tensors(batch.path, [prefix + name])[prefix + name], info.shape)
            else:
                states = batch.tensors[prefix + merged.masks[name]]
                yield padded(torch.ones(states.shape[:2], dtype=torch_type(info.dtype)), info.shape)

    rows = sum(batch.tensors[prefix + merged.masks[name]].shape[0] for batch in batches)
    return Streamed(TensorInfo(dtype=info.dtype, shape=(rows, *info.shape)), pieces)
