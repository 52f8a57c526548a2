"""The model that a run was collected from, loaded again by a later stage."""

from __future__ import annotations

import torch

from edadm_cli.artifacts import RunFolder
from edadm_cli.errors import InputError
from edadm_cli.models.loading import LoadedModel, load_model
from edadm_cli.models.registry import ModelEntry


def load_collected_model(run: RunFolder, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load the full-precision pipeline of a run.

    Raises:
        InputError: The model is gone, or its files are not those that were collected from.
    """
    collect = run.open("collect")
    entry = ModelEntry.model_validate(collect.json("sampling.json")["entry"])
    wanted = collect.manifest.model
    model = load_model(wanted.id, device, dtype, entry.model_copy(update={"revision": wanted.revision}))
    if model.ref.fingerprint != wanted.fingerprint:
        raise InputError(
            f"The model {wanted.id} has changed since it was collected from.",
            hint=f"edadm collect --model {wanted.id} --run {run.root} --force",
        )
    return model
