"""Checks a diffusers folder before any library reads it: no code, no pickles, no broken files."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import DENOISER_NAMES
from edadm_cli.models.shipped import shared_parts
from edadm_cli.models.sources.component_config import (
    require_fitting_classes,
    require_sound_config,
    require_sound_options,
)
from edadm_cli.models.sources.file_sets import (
    DIFFUSERS_STEM,
    MODEL_CONFIGS,
    TRANSFORMERS_STEM,
    component_folder,
    fingerprint_of,
)
from edadm_cli.models.sources.files import (
    INDEX_NAME,
    description_files,
    read_json_object,
    refuse_code,
    refuse_requests_for_code,
    regular_file,
)
from edadm_cli.models.sources.trusted_classes import class_of
from edadm_cli.models.sources.weights import WeightFiles, find_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Components that judge or describe images for people; images are sampled without them where the pipeline allows it.
SKIPPED_COMPONENTS = ("safety_checker", "feature_extractor")


@dataclass(frozen=True)
class Component:
    """One entry of a pipeline's index.

    Attributes:
        name: Its key, such as `unet`.
        library: The library that the index names, such as `diffusers`.
        cls: Its class.
        folder: The folder of its files.
        stem: Start of the names of its weight files; empty for a component without weights.
        weight_files: The chosen weight files; `None` for a component without weights (schedulers, tokenizers), and
            for one whose weights come from elsewhere.
        descriptions: Every other file that is read: configurations, vocabularies, templates, the index of shards.
    """

    name: str
    library: str
    cls: type
    folder: Path
    stem: str
    weight_files: WeightFiles | None
    descriptions: tuple[Path, ...]

    @property
    def is_module(self) -> bool:
        """Whether it has weights."""
        return issubclass(self.cls, nn.Module)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Its safetensors files; empty for a component without weights."""
        return () if self.weight_files is None else self.weight_files.files

    @property
    def variant(self) -> str | None:
        """Infix of the weight files when only such files exist (`fp16`)."""
        return None if self.weight_files is None else self.weight_files.variant

    def files(self) -> dict[str, Path]:
        """Returns every file that is read, under the name at which a library expects it: without a variant."""
        named = {path.relative_to(self.folder).as_posix(): path for path in (*self.descriptions, *self.weights)}
        if self.weight_files is None or self.variant is None:
            return named
        index = self.weight_files.index
        chosen = self.weights[0] if index is None else index
        named.pop(chosen.name)
        return {**named, f"{self.stem}.safetensors{'' if index is None else '.index.json'}": chosen}

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yields a temporary folder with links to exactly the files that are read.

        A library that loads from this folder cannot see anything that was not checked and hashed.
        """
        with tempfile.TemporaryDirectory(prefix="edadm-") as name:
            place = Path(name)
            for relative, path in self.files().items():
                (place / relative).parent.mkdir(exist_ok=True)
                os.symlink(path.resolve(), place / relative)
            yield place


@dataclass(frozen=True)
class PipelineFolder:
    """A folder with a `model_index.json` whose components are all known, present and whole.

    Attributes:
        path: The folder.
        pipeline_class: One of diffusers' own pipelines.
        components: The components of the pipeline.
        options: Its other constructor arguments; `None` for components that are absent or skipped.
        skipped: Library and class of the components that images are sampled without.
        requires_safety_checker: Its value in the index; `None` if it is not there.
    """

    path: Path
    pipeline_class: type[DiffusionPipeline]
    components: tuple[Component, ...]
    options: dict[str, Any]
    skipped: dict[str, tuple[str, str]]
    requires_safety_checker: bool | None

    def fingerprint(self) -> str:
        """Returns a hash over relative path and content hash of each file that is read to sample images."""
        files = {self.path / INDEX_NAME}
        for component in self.components:
            files.update(component.weights, component.descriptions)
        return fingerprint_of(self.path, files)

    def skipped_component(self, name: str) -> Component:
        """Checks the files of a component that images are sampled without, as those of the others are checked.

        Raises:
            InputError: It is missing, foreign, broken, or has no safetensors.
        """
        return _read_component(self.path, name, *self.skipped[name])


def read_folder(path: Path, *, weights_of_denoiser: bool = True) -> PipelineFolder:
    """Reads a diffusers folder's index and checks each component's files, without loading any.

    Args:
        path: The folder.
        weights_of_denoiser: Whether the denoiser's weights are there; else they come from elsewhere.

    Raises:
        InputError: Something is missing, foreign, truncated, pickled, ambiguous, a link that leaves the folder, or
            asks for code that is not the libraries' own.
    """
    from diffusers import DiffusionPipeline

    path = path.resolve()
    if regular_file(path, path / INDEX_NAME) is None:
        raise InputError(f"{path} is not a diffusers pipeline: it has no {INDEX_NAME}.")
    refuse_requests_for_code((path / INDEX_NAME,))
    index = read_json_object(path / INDEX_NAME)
    if not isinstance(index.get("_class_name"), str):
        raise InputError(
            f"{path / INDEX_NAME} does not name one of diffusers' own pipelines; "
            "a pipeline with code of its own is not run."
        )
    pipeline_class = class_of(path, "diffusers", index["_class_name"])
    if not issubclass(pipeline_class, DiffusionPipeline):
        raise InputError(f"{path / INDEX_NAME} names {pipeline_class.__name__}, which is not a pipeline.")
    named = _named_components(path, pipeline_class, index)
    skipped = {
        name: named.pop(name) for name in SKIPPED_COMPONENTS if name in named and _is_skipped(pipeline_class, name)
    }
    components = tuple(
        _read_component(path, name, *pair, has_weights=weights_of_denoiser or name not in DENOISER_NAMES)
        for name, pair in named.items()
    )
    require_fitting_classes(path / INDEX_NAME, pipeline_class, {part.name: part.cls for part in components})
    options = _constructor_options(path, pipeline_class, index, set(named))
    require_sound_options(path / INDEX_NAME, pipeline_class, options)
    required = index.get("requires_safety_checker")
    return PipelineFolder(
        path, pipeline_class, components, options, skipped, required if isinstance(required, bool) else None
    )


def _named_components(
    path: Path, pipeline_class: type[DiffusionPipeline], index: dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """Returns the library and the class of each component that an index names."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    named = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if name in parameters and inspect.Parameter.empty is not parameters[name].default and not _is_pair(value):
            continue  # a list that is an option of the pipeline, not a component
        if not _is_pair(value):
            raise InputError(f"{path / INDEX_NAME}: '{name}' is not a pair of library and class.")
        if value[0] is None or value[1] is None:
            continue
        if name not in parameters:
            raise InputError(
                f"{path / INDEX_NAME} names a component '{name[:80]}', which {pipeline_class.__name__} does not take."
            )
        named[name] = (value[0], value[1])
    return named


def _is_skipped(pipeline_class: type[DiffusionPipeline], name: str) -> bool:
    """Returns whether images are sampled without a component: some pipelines encode images with a feature extractor."""
    return name == "safety_checker" or name in pipeline_class._optional_components


def _is_pair(value: list[Any]) -> bool:
    return len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def _constructor_options(
    path: Path, pipeline_class: type[DiffusionPipeline], index: dict[str, Any], present: set[str]
) -> dict[str, Any]:
    """Returns the arguments of the pipeline's constructor that are no components of the folder."""
    options: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if name in present or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        value = index.get(name)
        if name == "requires_safety_checker":
            options[name] = False
        elif name in index and not (isinstance(value, list) and _is_pair(value)):
            options[name] = value
        elif name in SKIPPED_COMPONENTS or name in pipeline_class._optional_components or value == [None, None]:
            options[name] = None
        elif parameter.default is inspect.Parameter.empty:
            raise InputError(f"{path / INDEX_NAME} names no '{name}', which {pipeline_class.__name__} needs.")
    return options


def _read_component(root: Path, name: str, library: str, class_name: str, *, has_weights: bool = True) -> Component:
    """Checks the files of one component, without loading any.

    Raises:
        InputError: A file is missing, foreign, broken, pickled, or asks for code.
    """
    cls = class_of(root, library, class_name)
    shared = shared_parts(root).get(name)
    folder = component_folder(root, name, class_name) if shared is None else shared
    root = root if shared is None else shared
    refuse_code(folder)
    if not issubclass(cls, nn.Module):
        descriptions = _descriptions_without_weights(root, folder, name, cls)
        refuse_requests_for_code(descriptions)
        require_sound_config(name, cls, descriptions)
        return Component(name, library, cls, folder, "", None, descriptions)
    stem = _weights_stem(cls)
    configs = [regular_file(root, folder / file) for file in MODEL_CONFIGS]
    if configs[0] is None:
        raise InputError(f"{folder} has no config.json, which '{name}' ({class_name}) needs.")
    descriptions = tuple(path for path in configs if path is not None)
    refuse_requests_for_code(descriptions)
    require_sound_config(name, cls, descriptions)
    if not has_weights:
        return Component(name, library, cls, folder, stem, None, descriptions)
    weights = find_weights(root, folder, name, stem)
    index = () if weights.index is None else (weights.index,)
    return Component(name, library, cls, folder, stem, weights, (*descriptions, *index))


def _descriptions_without_weights(root: Path, folder: Path, name: str, cls: type) -> tuple[Path, ...]:
    """Returns the files of a scheduler, a guider, a tokenizer or a processor.

    Raises:
        InputError: The configuration is missing, or the class is none of these.
    """
    import diffusers

    if issubclass(cls, diffusers.SchedulerMixin | diffusers.BaseGuidance):
        file_name: str = cls.config_name  # type: ignore[attr-defined]
        config = regular_file(root, folder / file_name)
        if config is None:
            raise InputError(f"{folder} has no {file_name}, which '{name}' ({cls.__name__}) needs.")
        return (config,)
    if not issubclass(cls, _classes_without_weights()):
        raise InputError(
            f"{root / INDEX_NAME}: '{name}' is a {cls.__name__}, which is neither a model, a scheduler, a guider, "
            "a tokenizer nor a processor, and is not loaded."
        )
    return description_files(root, folder)


def _weights_stem(cls: type) -> str:
    from transformers import PreTrainedModel

    return TRANSFORMERS_STEM if issubclass(cls, PreTrainedModel) else DIFFUSERS_STEM


def _classes_without_weights() -> tuple[type, ...]:
    import transformers

    processors = (
        transformers.ImageProcessingMixin,
        transformers.FeatureExtractionMixin,
        transformers.ProcessorMixin,
    )
    return (transformers.PreTrainedTokenizerBase, *processors)
