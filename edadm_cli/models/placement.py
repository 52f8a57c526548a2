"""Decides where the weights of a pipeline are while it runs, by their size and by the memory that is available.

memory   All components are on the device.
turns    The text encoders are loaded first. When they have encoded all prompts they are freed, and the denoiser is
         loaded.
disk     As with `turns`, but each layer of the denoiser is read from disk whenever it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edadm_cli.errors import UsageError
from edadm_cli.stage_config import Weights

if TYPE_CHECKING:
    import torch

Placement = Literal["memory", "turns", "disk"]

SAMPLING_SHARE = 0.7
"""The share of the device's memory that weights may take while a pipeline samples; activations need the rest."""
LEARNING_SHARE = 0.45
"""The share that the float32 weights of a denoiser may take while it is reconstructed.

Codes, rows and what is learned need the rest.
"""
_ENCODERS = "text_encoder"
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_GIB = 2**30


def memory_of(device: torch.device) -> int:
    """Returns the bytes of memory that this process may use on a device.

    On a GPU this is the process's share of the GPU's memory. On a CPU it is the memory of the host or of the container,
    whichever is smaller.
    """
    if device.type == "cuda":
        import torch

        # torch needs the index of the device here, which the name 'cuda' does not contain
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(index))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for path in _LIMITS if (limit := _limit(path)) is not None)])


def placement(sizes: Mapping[str, int], weights: Weights, device: torch.device) -> Placement:
    """Returns where the weights of a pipeline are while it samples.

    Args:
        sizes: The bytes of each component, by name.
        weights: What the user asked for; `auto` takes the first placement of this module that fits.
        device: The device that the pipeline runs on.
    """
    if weights != "auto":
        return weights
    limit = SAMPLING_SHARE * memory_of(device)
    if sum(sizes.values()) <= limit:
        return "memory"
    return "turns" if sum(size for name, size in sizes.items() if not is_encoder(name)) <= limit else "disk"


def is_encoder(name: str) -> bool:
    """Returns whether a component of this name encodes prompts."""
    return name.startswith(_ENCODERS)


def described(chosen: Placement, needed: int, device: torch.device) -> str:
    """Returns a sentence that states a placement, the bytes that are needed and the bytes that are available.

    Args:
        chosen: The placement.
        needed: The bytes that the weights take.
        device: The device that the pipeline runs on.
    """
    where = {
        "memory": "stay in memory",
        "turns": "take turns: the text encoders are freed before the denoiser is loaded",
        "disk": "stay on disk and are read whenever they are used, which takes longer",
    }[chosen]
    return (
        f"The weights {where}, because they take {needed / _GIB:.1f} GiB and {device} has "
        f"{memory_of(device) / _GIB:.1f} GiB; --weights memory and --weights disk decide otherwise."
    )


def not_readable_from_disk(model: str) -> UsageError:
    """Returns the error for a model whose weights are to be read from disk, and whose files do not allow that."""
    return UsageError(
        f"Weights are read from disk for models in diffusers' layout, and {model} is a single file or names its tensors"
        " as earlier versions of diffusers did.",
        hint="--weights memory",
    )


def _limit(path: Path) -> int | None:
    """Returns the memory limit of a control group, in bytes; `None` if it has none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
