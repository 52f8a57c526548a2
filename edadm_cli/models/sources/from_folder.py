"""Builds a pipeline from a checked diffusers folder, component by component.

diffusers' own loader is not used: it also looks for code beside a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.families.registry import decodes_in_tiles_only
from edadm_cli.models.sources.component_config import require_short_prompts
from edadm_cli.models.sources.containment import bounded_size, no_network, no_questions
from edadm_cli.models.sources.folder import Component, PipelineFolder
from edadm_cli.quant.network import deploy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CPU = torch.device("cpu")
_LONGEST_REASON = 400  # characters of another library's error


def load_folder(
    folder: PipelineFolder,
    dtype: torch.dtype,
    ready: Mapping[str, nn.Module] | None = None,
    device: torch.device = _CPU,
) -> DiffusionPipeline:
    """Builds the pipeline of a folder.

    Each component is loaded from a temporary folder that holds links to the checked files and nothing else, and is
    moved to the device before the next one is loaded.

    Args:
        folder: The checked folder.
        dtype: Element type of the floating-point weights.
        ready: Components that are there already, by name.
        device: Where the components are moved to.

    Raises:
        InputError: A component cannot be loaded, lacks a tensor, or holds values that are not finite.
    """
    with no_questions(), no_network():
        components: dict[str, Any] = dict(ready or {})
        for component in folder.components:
            if component.name not in components:
                components[component.name] = _load_component(component, dtype, device)
        require_short_prompts(folder.path, components)
        try:
            pipeline = folder.pipeline_class(**folder.options, **components)
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{folder.path} has no working {folder.pipeline_class.__name__}: {first_sentence(error)}"
            ) from error
    if decodes_in_tiles_only(components.get("vae")):
        components["vae"].enable_tiling()
    return pipeline


def _load_component(component: Component, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads a component, and turns the errors of its library into an `InputError` that names the file."""
    with component.staged() as place:
        try:
            if not component.is_module:
                return _load_rest(component, place)
            return _load_module(component, place, dtype, device)
        except (EdadmError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            where = component.weights[0] if len(component.weights) == 1 else component.folder
            reason = first_sentence(error).replace(str(place), str(component.folder))
            raise InputError(f"{where} cannot be loaded as {component.cls.__name__}: {reason}") from error


def empty_module(component: Component, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Builds a component of diffusers with its parameters on the `meta` device and its buffers filled, as diffusers
    fills them where the component is loaded in an element type.

    Raises:
        InputError: Its configuration does not fit its class.
    """
    from accelerate import init_empty_weights

    cls: Any = component.cls
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with component.staged() as place, no_network(), init_empty_weights(include_buffers=False):
            module: nn.Module = cls.from_config(cls.load_config(place, local_files_only=True))
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{component.folder} cannot be built as {cls.__name__}: {first_sentence(error)}") from error
    finally:
        torch.set_default_dtype(usual)
    return module


def _load_rest(component: Component, place: Path) -> Any:
    """Loads a scheduler, a guider, a tokenizer or a processor."""
    import diffusers

    loader: Any = component.cls
    if issubclass(component.cls, diffusers.SchedulerMixin | diffusers.BaseGuidance):
        return loader.from_pretrained(place, local_files_only=True)
    loaded = loader.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    if hasattr(loaded, "name_or_path"):
        loaded.name_or_path = str(component.folder)
    return loaded


def _load_module(component: Component, place: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Loads a network from a folder of links to its checked files.

    Raises:
        InputError: It is far larger than its weights, lacks a tensor, or holds values that are not finite.
    """
    from transformers import PreTrainedModel

    loader: Any = component.cls
    is_transformer = issubclass(component.cls, PreTrainedModel)
    options = {"trust_remote_code": False} if is_transformer else {}
    headers = [tensor for file in component.weights for tensor in read_tensor_header(file).values()]
    with bounded_size(component.descriptions[0], headers):
        module, info = loader.from_pretrained(
            place, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    # before the module is moved: a missing tensor has no data to move
    where = component.weights[0] if len(component.weights) == 1 else component.folder
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{where} lacks the tensor '{missing[0]}', which {component.cls.__name__} needs.")
    if is_transformer:
        module.config._name_or_path = module.name_or_path = str(component.folder)
    else:
        module.register_to_config(_name_or_path=str(component.folder))
    deploy(module, None)  # stages name the arithmetic or the engine that they compute with
    module = module.to(device)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not all(_is_finite(part) for part in plain_tensors(tensor)):
            raise InputError(f"{where}: the tensor '{name}' holds values that are not finite (NaN or infinity).")
    return module


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensor itself, or its parts where a library holds codes and scales in one object."""
    whole: Any = tensor
    if not is_traceable_wrapper_subclass(whole):
        return [whole]
    names, _ = whole.__tensor_flatten__()
    return [getattr(whole, name) for name in names]


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def first_sentence(error: BaseException) -> str:
    """Returns the message of another library's error, on one line and shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"\.\s+(?=[A-Z])", text, maxsplit=1)[0][:_LONGEST_REASON]
    return sentence if sentence.endswith(".") else f"{sentence}."
