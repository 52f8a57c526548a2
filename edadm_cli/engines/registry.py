"""Finds engines by name: those of this package, and those of other packages, by the entry-point group `edadm.engines`.

    [project.entry-points."edadm.engines"]
    mine = "my_package.engine:MyEngine"

The value of the entry point names a subclass of `engines.base.Engine`, or another callable that returns an engine.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint
from itertools import groupby

import torch
from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.engines.base import Engine, FileEngine
from edadm_cli.errors import MachineError, UsageError, missing_package
from edadm_cli.plugins import load_plugin, origin, plugin_points, same_name

# the module and class of each engine, imported only on demand because each needs its own libraries
_ENGINES = {
    "reference": ("edadm_cli.engines.reference", "ReferenceEngine"),
    "openvino": ("edadm_cli.engines.openvino", "OpenVinoEngine"),
    "cuda": ("edadm_cli.engines.cuda", "CudaEngine"),
    "onnxruntime": ("edadm_cli.engines.onnx", "OnnxRuntimeEngine"),
}
ENGINE_NAMES = tuple(_ENGINES)
_DEFAULTS = {"cpu": "openvino", "cuda": "cuda"}
GROUP = "edadm.engines"
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # no hyphens, because hyphens separate the parts of artifact names
_RULE = "names of engines consist of lower-case letters, digits and underscores"
_FORMER_NAMES = {"triton": "cuda"}  # names of engines in version 0.1, which its artifacts still hold


def engine_names() -> tuple[str, ...]:
    """Returns the names of all engines: first those of this package, then those of other packages, sorted."""
    return *ENGINE_NAMES, *_outside()


def engine(name: str) -> Engine:
    """Returns the engine of a name.

    Raises:
        UsageError: There is no engine of that name.
        MachineError: A library that the engine needs is not installed, the entry point of another package is not an
            engine, or two packages have an engine of that name.
    """
    name = _FORMER_NAMES.get(name, name)
    outside = {} if name in _ENGINES else _outside()
    if name not in _ENGINES and name not in outside:
        rule = "" if _NAME.fullmatch(name) else f" {_RULE[0].upper()}{_RULE[1:]}."
        raise UsageError(
            f"There is no engine '{name}'; there are {', '.join(engine_names())}.{rule}", hint="edadm engines"
        )
    if name in outside:
        return _outside_engine(outside[name])
    try:
        return _shipped_engine(*_ENGINES[name])
    except ModuleNotFoundError as error:
        raise missing_package(error, f"The engine '{name}'") from error
    except (ImportError, AttributeError) as error:  # a library of another version may lack a name
        raise MachineError(f"The libraries of the engine '{name}' cannot be loaded: {error}.") from error


def _shipped_engine(module: str, cls: str) -> Engine:
    shipped: Engine = getattr(import_module(module), cls)()
    return shipped


def _outside_engine(points: list[EntryPoint]) -> Engine:
    """Returns the engine of another package.

    Args:
        points: The entry points of the engine's name, of which there should be one.

    Raises:
        MachineError: There are several entry points of the name, the one cannot be loaded, or its engine has another
            name than the entry point.
    """
    point = points[0]
    if len(points) > 1:
        raise same_name(GROUP, point.name, map(origin, points))
    loaded = load_plugin(point, Engine)
    if loaded.name != point.name:
        raise MachineError(
            f"The engine of the entry point '{point.name}' ({point.value}) has another name, '{loaded.name}'.",
            hint="give the entry point and the engine the same name",
        )
    return loaded


def _outside() -> dict[str, list[EntryPoint]]:
    """Returns the entry points of other packages' engines by name, without those whose name cannot be used."""
    usable = [point for point in plugin_points(GROUP) if _fault_of_name(point.name) is None]
    return {name: list(points) for name, points in groupby(usable, key=lambda point: point.name)}


def unusable_engines() -> list[str]:
    """Returns one sentence for each engine of another package that no command can use because of its name."""
    faults = ((point, _fault_of_name(point.name)) for point in plugin_points(GROUP))
    return [
        f"The engine '{point.name}' of another package ({point.value}) cannot be used: {fault}."
        for point, fault in faults
        if fault is not None
    ]


def _fault_of_name(name: str) -> str | None:
    """Returns why an engine of another package cannot have a name; `None` if it can."""
    if name in _ENGINES or name in _FORMER_NAMES:
        return "edadm itself has an engine of that name"
    return None if _NAME.fullmatch(name) else _RULE


def default_engine(device: torch.device) -> Engine:
    """Returns the engine that a device uses if no engine is named."""
    return engine(_DEFAULTS[device.type])


class EngineFacts(BaseModel):
    """Describes an engine and what it can do on this machine, as `edadm engines --json` prints it."""

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
    """Returns the facts about every engine on this machine, with the reason for each device that it cannot run on."""
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
