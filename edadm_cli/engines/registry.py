"""The engines there are."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from edadm_cli.engines.base import Engine
from edadm_cli.errors import UsageError

# name -> module and class; imported when asked for, since each brings libraries of its own
_ENGINES = {
    "reference": ("edadm_cli.engines.reference", "ReferenceEngine"),
    "openvino": ("edadm_cli.engines.openvino", "OpenVinoEngine"),
    "triton": ("edadm_cli.engines.triton", "TritonEngine"),
    "onnxruntime": ("edadm_cli.engines.onnx", "OnnxRuntimeEngine"),
}
ENGINE_NAMES = tuple(_ENGINES)
_DEFAULTS = {"cpu": "openvino", "cuda": "triton"}


def engine(name: str) -> Engine:
    """An engine by name.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in _ENGINES:
        raise UsageError(f"There is no engine '{name}'; there are {', '.join(ENGINE_NAMES)}.")
    module, cls = _ENGINES[name]
    make: Callable[[], Engine] = getattr(import_module(module), cls)
    return make()


def default_engine(device: torch.device) -> Engine:
    """The engine of a device when none is named."""
    return engine(_DEFAULTS[device.type])
