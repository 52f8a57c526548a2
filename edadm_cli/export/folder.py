"""Writes a diffusers pipeline folder whose denoiser is packed."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from edadm_cli.artifacts import load_json, save_json
from edadm_cli.artifacts.files import explained_os_errors
from edadm_cli.artifacts.streaming import stream_shards, streamed
from edadm_cli.errors import InputError
from edadm_cli.export.sizes import exact_narrow
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.sources.files import INDEX_NAME
from edadm_cli.models.sources.folder import Component, PipelineFolder, read_folder

_WEIGHTS_STEM = "diffusion_pytorch_model"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # of configurations of transformers, the second one in earlier versions
_PLACE_KEYS = ("_name_or_path", "name_or_path")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", INDEX_NAME)
_NARROW_NAMES = ("bfloat16", "float16")
_SHARD_BYTES = 10**10  # the size at which diffusers begins another file


def write_pipeline(
    model: LoadedModel,
    folder: Path,
    quantization_configs: Mapping[str, Mapping[str, Any]],
    changed: Collection[str] = (),
) -> list[str]:
    """Writes the pipeline of `model`, whose denoisers have quantized layers, as a diffusers folder.

    Components other than the denoiser are copied from the source byte for byte: the files that were checked when the
    model was loaded, and no others. Two things in their configurations are changed: the element type of a text encoder
    is float32, and the place that a component was once loaded from, a path of somebody's machine, is left out.
    Components that changed after loading, and those of a model without a folder, are saved. The safety checker and the
    feature extractor, which sampling skips, are copied as well.

    Args:
        model: The pipeline.
        folder: The folder to write.
        quantization_configs: The `quantization_config` in `config.json` of each denoiser, by the component's name.
        changed: Names of components whose weights differ from those of the source.

    Returns:
        One sentence for each component that could not be copied and is left out.

    Raises:
        MachineError: The disk is full or permission is denied.
    """
    with explained_os_errors(folder), quiet_libraries():
        model.pipeline.save_config(folder)
        source = None if model.folder is None else read_folder(model.folder)
        sources = {} if source is None else {component.name: component for component in source.components}
        for name, component in model.pipeline.components.items():
            place = folder / name
            if name in quantization_configs:
                _write_denoiser(component, place, quantization_configs[name])
            elif component is not None and name not in changed and _is_copyable(sources.get(name), source, component):
                _copy(sources[name], place)
            elif component is not None:
                component.save_pretrained(place)
        left_out = [] if source is None else _copy_skipped(source, folder)
        for path in folder.rglob("*.json"):
            if path.name in _CONFIGURATIONS:
                _forget_place(path)
        return left_out


def _forget_place(path: Path) -> None:
    """Removes from a configuration the place that its component was once loaded from."""
    config = load_json(path)
    if isinstance(config, dict) and any(config.get(key) for key in _PLACE_KEYS):
        save_json(path, {key: value for key, value in config.items() if key not in _PLACE_KEYS})


def _write_denoiser(denoiser: nn.Module, place: Path, quantization_config: Mapping[str, Any]) -> None:
    """Writes the configuration and, one tensor after the other, the weights."""
    denoiser.save_config(place)  # type: ignore[operator]
    config = load_json(place / "config.json")
    # one value per line with little indentation: the plan is a large part of the export of a small denoiser
    save_json(place / "config.json", {**config, "quantization_config": dict(quantization_config)}, indent=1)
    scales = {name for name, _ in denoiser.named_buffers()}
    tensors = {
        name: streamed(tensor, None if name in scales else exact_narrow(tensor))
        for name, tensor in denoiser.state_dict().items()
    }
    stream_shards(place, _WEIGHTS_STEM, tensors, _SHARD_BYTES)


def _is_copyable(source: Component | None, folder: PipelineFolder | None, component: object) -> bool:
    """Returns whether a component is unchanged, in a folder of its own, and not a variant that has to be named."""
    return (
        source is not None
        and folder is not None
        and source.folder != folder.path
        and source.variant is None
        and type(component) is source.cls
        and not hasattr(component, "set_timesteps")  # schedulers may have been exchanged or configured
    )


def _copy(source: Component, place: Path) -> None:
    """Copies the files of a component. Its configuration names float32, the type that denoisers are loaded in.

    transformers loads a model in the type that its configuration names, and diffusers in float32, unless `dtype`
    is given: a text encoder in bfloat16 would not fit its denoiser.
    """
    for relative, path in source.files().items():
        (place / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / relative)
    config = place / "config.json"
    if source.is_module and config.is_file():
        before = load_json(config)
        if (after := _in_float32(before)) != before:
            save_json(config, after)


def _in_float32(config: Any) -> Any:
    """Returns a configuration, with those inside it, whose element types are float32."""
    if isinstance(config, dict):
        return {
            key: "float32" if key in _DTYPE_KEYS and value in _NARROW_NAMES else _in_float32(value)
            for key, value in config.items()
        }
    return config


def _copy_skipped(source: PipelineFolder, folder: Path) -> list[str]:
    """Copies the components that sampling skips, and names them in the index as the source does."""
    skipped, left_out = {}, []
    for name in source.skipped:
        try:
            skipped[name] = source.skipped_component(name)
        except InputError as error:
            left_out.append(f"The export has no '{name}', because it cannot be copied: {error.message}")
    if "safety_checker" in skipped and "feature_extractor" in source.skipped and "feature_extractor" not in skipped:
        del skipped["safety_checker"]
        left_out.append("The export has no 'safety_checker', because a checker needs the 'feature_extractor'.")
    for name, component in skipped.items():
        _copy(component, folder / name)
    saved = load_json(folder / INDEX_NAME)
    index = saved | {name: [component.library, component.cls.__name__] for name, component in skipped.items()}
    if source.requires_safety_checker is not None:
        index["requires_safety_checker"] = source.requires_safety_checker
    if index != saved:
        save_json(folder / INDEX_NAME, index)
    return left_out
