"""Makes `DiffusionPipeline.from_pretrained` understand `quant_method: "edadm"` without a line of code.

diffusers looks quantization methods up in two dictionaries and offers no entry point to add to them. torch does: it
calls every entry point of the group `torch.backends` when it is imported. Ours only sets a watch on the import of
diffusers' dictionaries, so that it costs nothing to programs that do not use diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_WATCHED = "diffusers.quantizers.auto"
_QUANTIZER = "edadm_cli.integrations.quantizer"


def register() -> None:
    """Register the quantizer now if diffusers' registry is loaded, else as soon as it is; more calls do nothing."""
    if _WATCHED in sys.modules:
        _add_quantizer(sys.modules[_WATCHED])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _add_quantizer(registry: ModuleType) -> None:
    if _QUANTIZER in sys.modules and not hasattr(sys.modules[_QUANTIZER], "EdadmQuantizer"):
        return  # that module is what imports diffusers just now; it registers itself when it is complete
    from edadm_cli.integrations.quantizer import METHOD, EdadmConfig, EdadmQuantizer

    registry.AUTO_QUANTIZER_MAPPING[METHOD] = EdadmQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = EdadmConfig


class _Watch(MetaPathFinder):
    """Finds the watched module as usual, and adds to it once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _AddingLoader(spec.loader)
        return spec


class _AddingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_quantizer(module)
