"""A diffusers pipeline folder whose denoiser is packed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import load_json, save_json, save_tensors
from edadm_cli.artifacts.files import explained_os_errors
from edadm_cli.models.folder import Component, read_folder
from edadm_cli.models.loading import LoadedModel, quiet_libraries

_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_DESCRIPTIONS = (".json", ".txt", ".model")
_NARROW = (torch.float16, torch.bfloat16)


def write_pipeline(model: LoadedModel, folder: Path, quantization_config: Mapping[str, Any]) -> None:
    """Write the pipeline of `model`, whose denoiser has quantized layers, as a diffusers folder.

    Components other than the denoiser are copied as they lie in the source, byte for byte, or saved where the model
    has no folder.

    Raises:
        MachineError: The disk is full or permission is denied.
    """
    with explained_os_errors(folder), quiet_libraries():
        model.pipeline.save_config(folder)
        found = () if model.folder is None else read_folder(model.folder).components
        sources = {component.name: component for component in found}
        for name, component in model.pipeline.components.items():
            place = folder / name
            if name == model.denoiser_name:
                _write_denoiser(model.denoiser, place, quantization_config)
            elif component is not None and _is_copyable(sources.get(name), model.folder, component):
                _copy(sources[name], place)
            elif component is not None:
                component.save_pretrained(place)


def exact_narrow(tensor: Tensor) -> Tensor:
    """The tensor in the narrowest of float16, bfloat16 and its own dtype that holds every value exactly."""
    if not tensor.is_floating_point():
        return tensor
    for dtype in _NARROW:
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def component_sizes(folder: Path) -> dict[str, float]:
    """MiB on disk of each component's folder."""
    return {
        child.name: sum(file.stat().st_size for file in child.rglob("*") if file.is_file()) / 2**20
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }


def _write_denoiser(denoiser: nn.Module, place: Path, quantization_config: Mapping[str, Any]) -> None:
    denoiser.save_config(place)  # type: ignore[operator]
    config = load_json(place / "config.json")
    # a line a value, but little indentation: the plan of a small denoiser counts against its size
    save_json(place / "config.json", {**config, "quantization_config": dict(quantization_config)}, indent=1)
    scales = {name for name, _ in denoiser.named_buffers()}
    tensors = {
        name: tensor if name in scales else exact_narrow(tensor) for name, tensor in denoiser.state_dict().items()
    }
    save_tensors(place / _WEIGHTS_FILE, tensors)


def _is_copyable(source: Component | None, root: Path | None, component: object) -> bool:
    """Whether a component is unchanged, in a folder of its own, and not in a variant that must be asked for."""
    return (
        source is not None
        and source.folder != root
        and source.variant is None
        and type(component) is source.cls
        and not hasattr(component, "set_timesteps")  # schedulers may have been exchanged or configured
    )


def _copy(source: Component, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    descriptions = [path for path in source.folder.iterdir() if path.suffix in _DESCRIPTIONS and path.is_file()]
    for path in (*source.weights, *descriptions):
        shutil.copyfile(path, place / path.name)
