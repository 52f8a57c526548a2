"""Where the weights of a pipeline are while it works, by what they need and what the device and the host have.

memory   all components are on the device.
turns    the text encoders first; once they have encoded all prompts they are freed, and the denoiser follows.
disk     the same, but that each layer of the denoiser is read from disk whenever it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from edadm_cli.stage_config import Weights

Placement = Literal["memory", "turns", "disk"]

SAMPLING_SHARE = 0.7
"""Share of the device's memory that weights may take while a pipeline samples; activations need the rest."""
LEARNING_SHARE = 0.45
"""The same for the float32 weights of a denoiser that is reconstructed, beside codes, rows and what learns."""
_ENCODERS = "text_encoder"
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_GIB = 2**30


def memory_of(device: torch.device) -> int:
    """Returns the bytes of memory that this process may use: its share of a GPU; or the host's, or its container's."""
    if device.type == "cuda":
        # torch wants the number of the device here, which 'cuda' alone does not have
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(index))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for path in _LIMITS if (limit := _limit(path)) is not None)])


def placement(sizes: Mapping[str, int], weights: Weights, device: torch.device) -> Placement:
    """Decides where the weights of a pipeline that samples are.

    Args:
        sizes: Bytes of each component, by name.
        weights: What the user asked for; `auto` takes the first placement of this module that fits.
        device: Where the pipeline computes.
    """
    if weights != "auto":
        return weights
    limit = SAMPLING_SHARE * memory_of(device)
    if sum(sizes.values()) <= limit:
        return "memory"
    return "turns" if sum(size for name, size in sizes.items() if not is_encoder(name)) <= limit else "disk"


def is_encoder(name: str) -> bool:
    """Whether a component of this name encodes prompts."""
    return name.startswith(_ENCODERS)


def described(chosen: Placement, needed: int, device: torch.device) -> str:
    """Returns a sentence on a placement other than `memory`, with what is needed and what there is."""
    where = {
        "memory": "stay in memory",
        "turns": "take turns: the text encoders are freed before the denoiser is loaded",
        "disk": "stay on disk and are read whenever they are used, which takes longer",
    }[chosen]
    return (
        f"The weights {where}, because they take {needed / _GIB:.1f} GiB and {device} has "
        f"{memory_of(device) / _GIB:.1f} GiB; --weights memory and --weights disk decide otherwise."
    )


def _limit(path: Path) -> int | None:
    """Returns the limit of a control group, where there is one."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
