"""The engines there are."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.engines.base import Engine, FileEngine
from edadm_cli.errors import MachineError, UsageError

# name -> module and class; imported when asked for, since each brings libraries of its own
_ENGINES = {
    "reference": ("edadm_cli.engines.reference", "ReferenceEngine"),
    "openvino": ("edadm_cli.engines.openvino", "OpenVinoEngine"),
    "cuda": ("edadm_cli.engines.cuda", "CudaEngine"),
    "onnxruntime": ("edadm_cli.engines.onnx", "OnnxRuntimeEngine"),
}
ENGINE_NAMES = tuple(_ENGINES)
_DEFAULTS = {"cpu": "openvino", "cuda": "cuda"}
_FORMER_NAMES = {"triton": "cuda"}  # what version 0.1 called an engine; its artifacts still carry that name


def engine(name: str) -> Engine:
    """An engine by name.

    Raises:
        UsageError: There is none of that name.
        MachineError: A library that it is built on is not installed.
    """
    name = _FORMER_NAMES.get(name, name)
    if name not in _ENGINES:
        raise UsageError(f"There is no engine '{name}'; there are {', '.join(ENGINE_NAMES)}.")
    module, cls = _ENGINES[name]
    try:
        make: Callable[[], Engine] = getattr(import_module(module), cls)
    except ImportError as error:
        raise MachineError(
            f"The engine '{name}' needs the package '{error.name}', which is not installed here.", hint="edadm engines"
        ) from error
    return make()


def default_engine(device: torch.device) -> Engine:
    """The engine of a device when none is named."""
    return engine(_DEFAULTS[device.type])


class EngineFacts(BaseModel):
    """What an engine is and can do here, as `edadm engines --json` shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    default_for: tuple[str, ...] = Field(description="devices whose engine it is when none is named")
    layer_bound: float | None = Field(
        description="largest error of a layer against exact integers; null: not installed"
    )
    has_files: bool = Field(description="whether `edadm export --engine` writes files that it loads")
    refusals: dict[str, str | None] = Field(description="device -> why it cannot run there; null where it can")


def engine_facts() -> list[EngineFacts]:
    """Every engine, with what it can do on this machine and why it is refused."""
    return [_facts(name) for name in ENGINE_NAMES]


def _facts(name: str) -> EngineFacts:
    default_for = tuple(device for device, own in _DEFAULTS.items() if own == name)
    try:
        found = engine(name)
    except MachineError as error:
        refusals = dict.fromkeys(_DEFAULTS, error.message)
        return EngineFacts(
            name=name, description="", default_for=default_for, layer_bound=None, has_files=False, refusals=refusals
        )
    return EngineFacts(
        name=name,
        description=found.description,
        default_for=default_for,
        layer_bound=found.layer_bound,
        has_files=isinstance(found, FileEngine),
        refusals={device: found.refusal(torch.device(device)) for device in _DEFAULTS},
    )
