"""The engines there are: those of this package, and those of packages that name some in the group `edadm.engines`.

    [project.entry-points."edadm.engines"]
    mine = "my_package.engine:MyEngine"

The value names a class derived from `engines.base.Engine`, or anything that returns an engine when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import torch
from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.engines.base import Engine, FileEngine
from edadm_cli.errors import MachineError, UsageError, missing_package

# name -> module and class; imported when asked for, since each brings libraries of its own
_ENGINES = {
    "reference": ("edadm_cli.engines.reference", "ReferenceEngine"),
    "openvino": ("edadm_cli.engines.openvino", "OpenVinoEngine"),
    "cuda": ("edadm_cli.engines.cuda", "CudaEngine"),
    "onnxruntime": ("edadm_cli.engines.onnx", "OnnxRuntimeEngine"),
}
ENGINE_NAMES = tuple(_ENGINES)
_DEFAULTS = {"cpu": "openvino", "cuda": "cuda"}
ENTRY_POINTS = "edadm.engines"
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # names of artifacts hold it between hyphens
_FORMER_NAMES = {"triton": "cuda"}  # what version 0.1 called an engine; its artifacts still carry that name


def engine_names() -> tuple[str, ...]:
    """Returns the names of all engines: of this package first, then of other packages in the order of their names."""
    return *ENGINE_NAMES, *sorted(_outside())


def engine(name: str) -> Engine:
    """Returns an engine by name.

    Raises:
        UsageError: There is none of that name.
        MachineError: A library that it is built on is not installed, or what another package calls an engine is none.
    """
    name = _FORMER_NAMES.get(name, name)
    outside = {} if name in _ENGINES else _outside()
    if name not in _ENGINES and name not in outside:
        raise UsageError(f"There is no engine '{name}'; there are {', '.join(engine_names())}.", hint="edadm engines")
    try:
        if name in outside:
            make: Callable[[], object] = outside[name].load()
        else:
            module, cls = _ENGINES[name]
            make = getattr(import_module(module), cls)
    except ModuleNotFoundError as error:
        raise missing_package(error, f"The engine '{name}'") from error
    except ImportError as error:
        raise MachineError(f"The libraries of the engine '{name}' cannot be loaded: {error}.") from error
    except AttributeError as error:
        raise MachineError(f"{outside[name].value} of the group {ENTRY_POINTS} does not exist.") from error
    try:
        made = make()
    except TypeError:
        made = None
    if not isinstance(made, Engine) or made.name != name:
        raise MachineError(f"{outside[name].value} of the group {ENTRY_POINTS} is no engine with the name '{name}'.")
    return made


def _outside() -> dict[str, EntryPoint]:
    """Returns the engines that other packages name, but for those that this package has."""
    points = entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if point.name not in _ENGINES and _NAME.fullmatch(point.name)}


def default_engine(device: torch.device) -> Engine:
    """Returns the engine of a device when none is named."""
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
    """Returns every engine, with what it can do on this machine and why it is refused."""
    return [_facts(name) for name in engine_names()]


def _facts(name: str) -> EngineFacts:
    default_for = tuple(device for device, default in _DEFAULTS.items() if default == name)
    try:
        known = engine(name)
    except MachineError as error:
        refusals = dict.fromkeys(_DEFAULTS, error.message)
        return EngineFacts(
            name=name, description="", default_for=default_for, layer_bound=None, has_files=False, refusals=refusals
        )
    return EngineFacts(
        name=name,
        description=known.description,
        default_for=default_for,
        layer_bound=known.layer_bound,
        has_files=isinstance(known, FileEngine),
        refusals={device: known.refusal(torch.device(device)) for device in _DEFAULTS},
    )
