"""Diffusion models made small and fast after training: EDA-DM (arXiv 2401.04585), as a command and as a library.

`quantize` makes an export of a model, `load` gives a pipeline that runs it. Importing the package is light: what these
need is imported when they are first used. The import also lets diffusers load exported pipelines.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edadm_cli.integrations.autoload import register
from edadm_cli.version import __version__

if TYPE_CHECKING:
    from edadm_cli.library import Quantized, load, quantize

_LIBRARY = ("Quantized", "load", "quantize")

__all__ = ["Quantized", "__version__", "load", "quantize"]

register()


def __getattr__(name: str) -> Any:
    if name not in _LIBRARY:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module("edadm_cli.library"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARY})  # so that completion shows them before their first use
