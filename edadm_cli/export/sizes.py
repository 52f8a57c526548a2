"""Computes the size of an exported pipeline on disk, and of its weights in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import PipelineSize, TextEncoder
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.sources.from_folder import plain_tensors
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer

HALF_BYTES = 2
_NARROW = (torch.float16, torch.bfloat16)


def exact_narrow(tensor: Tensor) -> torch.dtype:
    """Returns the first of float16 and bfloat16 that holds every value of a tensor exactly, or else its own type."""
    if tensor.is_floating_point():
        for dtype in _NARROW:
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's weights on disk, each stored in the type that `exact_narrow` returns."""
    return sum(tensor.numel() * exact_narrow(tensor).itemsize for tensor in module.state_dict().values())


def component_sizes(folder: Path) -> dict[str, float]:
    """Returns the size on disk of each component's folder, in MiB."""
    return {
        child.name: sum(file.stat().st_size for file in child.rglob("*") if file.is_file()) / 2**20
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }


def loaded_bytes(model: LoadedModel) -> int:
    """Returns the bytes of a pipeline's weights loaded in float16; codes and their scales keep their types."""
    return sum(_half_bytes(part) for part in _networks(model).values())


def bytes_beside_denoisers(model: LoadedModel) -> int:
    """Returns the bytes of a pipeline's weights loaded in float16, without those of its denoisers."""
    denoisers = (model.denoiser_name, *model.further)
    return sum(_half_bytes(part) for name, part in _networks(model).items() if name not in denoisers)


def pipeline_size(
    sizes: Mapping[str, float],
    denoisers: Sequence[str],
    encoders: Mapping[str, TextEncoder],
    memory: int,
    memory_before: int,
) -> PipelineSize:
    """Returns the size of a whole pipeline, as exported and at full precision.

    Args:
        sizes: The `size_mib` of the export.
        denoisers: The names of the components that are quantized.
        encoders: The text encoders with 8-bit weights, by name.
        memory: The bytes of the exported pipeline's weights in memory.
        memory_before: The bytes of the full-precision pipeline's weights in memory.
    """
    disk = sum(size for name, size in sizes.items() if name not in ("denoiser_fp32", "ratio"))
    saved = sum(row.float_mib - row.size_mib for row in encoders.values())
    return PipelineSize(
        disk_mib=disk,
        disk_before_mib=disk - sum(sizes[name] for name in denoisers) + sizes["denoiser_fp32"] + saved,
        memory_mib=memory / 2**20,
        memory_before_mib=memory_before / 2**20,
    )


def _networks(model: LoadedModel) -> dict[str, nn.Module]:
    return {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}


def _half_bytes(module: nn.Module) -> int:
    """Returns the bytes of a network loaded in float16, in which quantized layers keep the types of their buffers."""
    total = 0
    for owner in module.modules():
        keeps_types = isinstance(owner, QuantizedLayer | QuantizedAttention)
        total += _bytes(owner.parameters(recurse=False), keeps_types=False)
        total += _bytes(owner.buffers(recurse=False), keeps_types=keeps_types)
    return total


def _bytes(tensors: Iterable[Tensor], *, keeps_types: bool) -> int:
    """Returns the bytes of tensors whose floating-point numbers take two bytes each, unless they keep their types."""
    total = 0
    for tensor in tensors:
        parts = plain_tensors(tensor)
        if keeps_types or len(parts) > 1 or not tensor.is_floating_point():
            total += sum(part.nbytes for part in parts)
        else:
            total += HALF_BYTES * tensor.numel()
    return total
