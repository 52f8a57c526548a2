"""Builds a stage's configuration from flags and a TOML file.

Flags override the file, and the file overrides the defaults. An unknown key is an error.

seed = 1                # top level: for every stage that has the field
[collect]               # a table: for that stage
num_trajectories = 512
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edadm_cli import bench, collect, evaluate, export, reconstruct, sample, select, sensitivity
from edadm_cli.artifacts import Stage
from edadm_cli.config import StageConfig
from edadm_cli.errors import UsageError, did_you_mean
from edadm_cli.plain_data import read_toml
from edadm_cli.recipe import load_recipe

_ALL = (
    *(collect.STAGE, select.STAGE, sensitivity.STAGE, reconstruct.STAGE),
    *(export.STAGE, bench.STAGE, evaluate.STAGE, sample.STAGE),
)
STAGES: dict[str, Stage[Any]] = {stage.kind: stage for stage in _ALL}
ConfigT = TypeVar("ConfigT", bound=StageConfig)


def read_config_file(path: Path | None) -> dict[str, Any]:
    """Reads a configuration file and checks that every key in it is known to some stage.

    Raises:
        UsageError: The file is missing or is not TOML, or a key or a table is unknown.
    """
    if path is None:
        return {}
    content = read_toml(path, "The configuration")
    fields = {name for stage in STAGES.values() for name in stage.config.model_fields}
    for key, value in content.items():
        if key in STAGES and isinstance(value, dict):
            for name in value:
                _check_known(path, name, set(STAGES[key].config.model_fields), within=key)
        elif isinstance(value, dict) and key not in fields:
            raise UsageError(
                f"The configuration {path} has a table [{key}], which is no stage.",
                hint=did_you_mean(key, STAGES) or f"the stages are {', '.join(STAGES)}",
            )
        else:
            _check_known(path, key, fields, fields | STAGES.keys())
    return content


def from_file(content: Mapping[str, Any], stage: str, key: str) -> Any:
    """Returns the value of a stage's field in a configuration file; `None` if it has none."""
    return content.get(stage, {}).get(key, content.get(key))


def build_config(stage: Stage[ConfigT], content: Mapping[str, Any], flags: Mapping[str, Any]) -> ConfigT:
    """Returns a stage's configuration from the file's top level, overridden by its table, and then by the given flags.

    Raises:
        UsageError: A bit width or a recipe does not exist.
        ValidationError: A value does not fit its field.
    """
    known = stage.config.model_fields
    fields = {key: value for key, value in content.items() if key in known}
    fields.update(content.get(stage.kind, {}))
    fields.update(flags)
    if fields.get("recipe") is not None:
        fields["recipe"] = load_recipe(recipe_name(fields["recipe"]))
    return stage.config.model_validate(fields)


def recipe_name(value: Any) -> str:
    """Returns the name or the file of a recipe from the value in a flag or a file.

    Raises:
        UsageError: The value is not a text: a recipe cannot be part of a configuration file.
    """
    if not isinstance(value, str):
        raise UsageError(
            f"A recipe is given by its name or by its own TOML file; got {value!r}.",
            hint="edadm reconstruct --recipe default",
        )
    return value


def _check_known(path: Path, key: str, known: set[str], alike: set[str] | None = None, within: str = "") -> None:
    if key not in known:
        full, command = (f"{within}.{key}", f"edadm {within} --help") if within else (key, "edadm --help")
        hint = did_you_mean(key, alike or known) or command
        raise UsageError(f"The configuration {path} has an unknown key '{full}'.", hint=hint)
