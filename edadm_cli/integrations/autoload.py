"""Makes `DiffusionPipeline.from_pretrained` understand `quant_method: "edadm"` without a line of code.

diffusers looks quantization methods up in two dictionaries, and the libraries of pipeline components in a third one. It
has no entry point that extends them. torch calls every entry point of the group `torch.backends` when it is imported;
ours watches the import of diffusers' dictionaries and does nothing else, so that it costs no time without diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZER = "edadm_cli.integrations.quantizer"
_REGISTRY = "diffusers.quantizers.auto"
# Modules of components that exports may contain, and the base class whose methods load them.
_COMPONENTS = {"edadm_cli.models.latent_diffusion": "ModelMixin", "edadm_cli.models.schedulers": "SchedulerMixin"}


def register() -> None:
    """Extends diffusers' dictionaries, now or as soon as they are imported; further calls do nothing."""
    watched = {finder.name for finder in sys.meta_path if isinstance(finder, _Watch)}
    for name, add in _WATCHED.items():
        if name in sys.modules:
            add(sys.modules[name])
        elif name not in watched:
            sys.meta_path.insert(0, _Watch(name, add))


def _add_quantizer(registry: ModuleType) -> None:
    """Imports our quantizer, unless its own import loads diffusers' dictionaries; `_complete` adds it."""
    _complete(import_module(_QUANTIZER))


def _complete(quantizer: ModuleType) -> None:
    """Adds the classes of our quantizer's module to diffusers' dictionaries once both are complete."""
    registry, is_complete = sys.modules.get(_REGISTRY), hasattr(quantizer, "EdadmQuantizer")
    if is_complete and hasattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        registry.AUTO_QUANTIZER_MAPPING[quantizer.METHOD] = quantizer.EdadmQuantizer  # type: ignore[union-attr]
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[quantizer.METHOD] = quantizer.EdadmConfig  # type: ignore[union-attr]


def _add_components(registry: ModuleType) -> None:
    loadable = getattr(registry, "LOADABLE_CLASSES", {})  # missing while that module is being imported
    for name, base in _COMPONENTS.items():
        loadable.setdefault(name, {base: ["save_pretrained", "from_pretrained"]})


_WATCHED: dict[str, Callable[[ModuleType], None]] = {
    _REGISTRY: _add_quantizer,
    _QUANTIZER: _complete,
    "diffusers.pipelines.pipeline_loading_utils": _add_components,
}


class _Watch(MetaPathFinder):
    """Finds the watched module as usual, and extends it once it is imported."""

    def __init__(self, name: str, add: Callable[[ModuleType], None]) -> None:
        self.name, self._add = name, add

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _AddingLoader(spec.loader, self._add)
        return spec


class _AddingLoader(Loader):
    def __init__(self, loader: Loader, add: Callable[[ModuleType], None]) -> None:
        self._loader, self._add = loader, add

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._add(module)
