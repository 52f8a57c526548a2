"""A diffusers folder, checked before any library is let near it: no code, no pickles, no broken files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edadm_cli.artifacts import file_sha256, load_json, read_tensor_header
from edadm_cli.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

INDEX_NAME = "model_index.json"
# Components that judge or describe images for people; arrays are sampled without them.
SKIPPED_COMPONENTS = ("safety_checker", "feature_extractor")
_LIBRARIES = ("diffusers", "transformers", "edadm_cli")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_DESCRIPTIONS = (".json", ".txt", ".model")


@dataclass(frozen=True)
class Component:
    """One entry of a pipeline's index.

    Attributes:
        name: Its key, such as `unet`.
        cls: Its class.
        folder: Where its files lie.
        weights: Its safetensors files; empty for what has none (schedulers, tokenizers).
        variant: Infix of the weight files where only such exist (`fp16`).
    """

    name: str
    cls: type
    folder: Path
    weights: tuple[Path, ...]
    variant: str | None

    @property
    def is_module(self) -> bool:
        """Whether it carries weights."""
        return issubclass(self.cls, nn.Module)


@dataclass(frozen=True)
class PipelineFolder:
    """A folder with a `model_index.json` whose components are all known, present and whole.

    Attributes:
        path: The folder.
        pipeline_class: One of diffusers' own pipelines.
        components: What the pipeline is built from.
        options: Its other constructor arguments; `None` for components that are absent or skipped.
    """

    path: Path
    pipeline_class: type[DiffusionPipeline]
    components: tuple[Component, ...]
    options: dict[str, Any]

    def fingerprint(self) -> str:
        """Hash over relative path and content hash of each file that decides what the pipeline computes."""
        files = {self.path / INDEX_NAME}
        for component in self.components:
            files.update(component.weights)
            files.update(path for path in component.folder.iterdir() if path.suffix in _DESCRIPTIONS and path.is_file())
        digest = sha256()
        for path in sorted(files):
            digest.update(f"{path.relative_to(self.path).as_posix()}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()


def read_folder(path: Path) -> PipelineFolder:
    """Read a diffusers folder's index and check each component's files, without loading any.

    Raises:
        InputError: Something is missing, foreign, truncated, pickled, or asks for code that is not the
            libraries' own.
    """
    from diffusers import DiffusionPipeline

    index = load_json(path / INDEX_NAME)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise InputError(
            f"{path / INDEX_NAME} does not name one of diffusers' own pipelines; "
            "a pipeline with code of its own is not run."
        )
    pipeline_class = _class_of(path, "diffusers", index["_class_name"])
    if not issubclass(pipeline_class, DiffusionPipeline):
        raise InputError(f"{path / INDEX_NAME} names {pipeline_class.__name__}, which is not a pipeline.")
    components = []
    for name, value in index.items():
        if name.startswith("_") or name in SKIPPED_COMPONENTS or not isinstance(value, list):
            continue
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise InputError(f"{path / INDEX_NAME}: '{name}' is not a pair of library and class.")
        if value[0] is not None and value[1] is not None:
            components.append(_read_component(path, name, value[0], value[1]))
    present = {component.name for component in components}
    options = _constructor_options(path, pipeline_class, index, present)
    return PipelineFolder(path, pipeline_class, tuple(components), options)


def _constructor_options(
    path: Path, pipeline_class: type[DiffusionPipeline], index: dict[str, Any], present: set[str]
) -> dict[str, Any]:
    """Constructor arguments that are no components of the folder."""
    options: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if name in present or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        value = index.get(name)
        if name == "requires_safety_checker":
            options[name] = False
        elif name in index and not isinstance(value, list):
            options[name] = value
        elif name in SKIPPED_COMPONENTS or name in pipeline_class._optional_components or value == [None, None]:
            options[name] = None
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"{path / INDEX_NAME} names no '{name}', which {pipeline_class.__name__} needs.")
    return options


def _read_component(root: Path, name: str, library: str, class_name: str) -> Component:
    cls = _class_of(root, library, class_name)
    folder = root / name
    if not folder.is_dir():
        if not (root / "config.json").is_file() and not (root / "scheduler_config.json").is_file():
            raise InputError(f"{root} has no folder '{name}', though {INDEX_NAME} names it ({class_name}).")
        folder = root  # old layout: one model and its scheduler side by side
    code = next(folder.glob("*.py"), None)
    if code is not None and code.stem == library:
        raise InputError(f"{code} is code that comes with the model, and such code is not run.")
    if not issubclass(cls, nn.Module):
        if not issubclass(cls, _classes_without_weights()):
            raise InputError(
                f"{root / INDEX_NAME}: '{name}' is a {class_name}, which is neither a model, a scheduler, "
                "a tokenizer nor a processor, and is not loaded."
            )
        return Component(name, cls, folder, (), None)
    weights, variant = _find_weights(folder, name, "model" if library == "transformers" else "diffusion_pytorch_model")
    for file in weights:
        read_tensor_header(file)
    return Component(name, cls, folder, weights, variant)


def _classes_without_weights() -> tuple[type, ...]:
    import diffusers
    import transformers

    processors = (
        transformers.ImageProcessingMixin,
        transformers.FeatureExtractionMixin,
        transformers.ProcessorMixin,
    )
    return (diffusers.SchedulerMixin, transformers.PreTrainedTokenizerBase, *processors)


def _class_of(root: Path, library: str, class_name: str) -> type:
    """The class that an index names, from the libraries that are trusted and from nowhere else."""
    from diffusers import pipelines

    if library.partition(".")[0] in _LIBRARIES and all(part.isidentifier() for part in library.split(".")):
        try:
            module: Any = importlib.import_module(library)
        except ImportError:
            module = None
    else:
        module = getattr(pipelines, library, None) if library.isidentifier() else None
        if not getattr(module, "__name__", "").startswith("diffusers.pipelines."):
            raise InputError(
                f"{root / INDEX_NAME} asks for {library}.{class_name}; "
                f"only classes of {', '.join(_LIBRARIES)} are loaded, so that no foreign code runs."
            )
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise InputError(
            f"{root / INDEX_NAME} asks for {library}.{class_name}, which the installed {library} does not have."
        )
    return cls


def _find_weights(folder: Path, name: str, stem: str) -> tuple[tuple[Path, ...], str | None]:
    for variant in (None, "fp16", "bf16"):
        infix = "" if variant is None else f".{variant}"
        whole = folder / f"{stem}{infix}.safetensors"
        if whole.is_file():
            return (whole,), variant
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            return _shards(index), variant
    pickle = next((path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES), None)
    if pickle is not None:
        raise InputError(
            f"{pickle} is a pickle, which can carry code and is not read; "
            f"{stem}.safetensors was wanted beside it for '{name}'."
        )
    raise InputError(f"{folder} has no {stem}.safetensors, which '{name}' needs.")


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = load_json(index).get("weight_map")
    names: Iterable[Any] = weight_map.values() if isinstance(weight_map, dict) else ()
    shards = sorted({str(name) for name in names})
    if not shards or any(Path(name).name != name for name in shards):
        raise InputError(f"{index} does not list the files of a sharded checkpoint.")
    missing = next((name for name in shards if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{index.parent / missing} is missing, though {index.name} lists it.")
    return tuple(index.parent / name for name in shards)
