"""From flags and a TOML file to a stage's configuration: defaults < file < flags; an unknown key is an error.

seed = 1                # top level: for every stage that has the field
[collect]               # a table: for that stage
num_trajectories = 512
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edadm_cli.artifacts import explained_os_errors
from edadm_cli.cli.places import bits_used_last
from edadm_cli.config import (
    BenchConfig,
    BitWidth,
    CollectConfig,
    EvaluateConfig,
    ExportConfig,
    ReconstructConfig,
    SampleConfig,
    SelectConfig,
    StageConfig,
)
from edadm_cli.errors import InputError, UsageError
from edadm_cli.recipe import load_recipe

if TYPE_CHECKING:
    from edadm_cli.cli.execution import Execution

STAGES: dict[str, type[StageConfig]] = {
    "collect": CollectConfig,
    "select": SelectConfig,
    "reconstruct": ReconstructConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "bench": BenchConfig,
}
StageT = TypeVar("StageT", bound=StageConfig)


def read_config_file(path: Path | None) -> dict[str, Any]:
    """Read a configuration file and check that every key in it is known to some stage.

    Raises:
        InputError: The file is missing or is not TOML.
        UsageError: A key or a table is unknown.
    """
    if path is None:
        return {}
    with explained_os_errors(path):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"The configuration {path} is not readable TOML: {error}.") from error
    for key, value in content.items():
        if key in STAGES and isinstance(value, dict):
            for name in value:
                _check_known(path, f"{key}.{name}", name in STAGES[key].model_fields)
        else:
            _check_known(path, key, any(key in stage.model_fields for stage in STAGES.values()))
    return content


def stage_fields(content: Mapping[str, Any], stage: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a stage's fields: the file's top level, then its table, then the flags that were given."""
    known = STAGES[stage].model_fields
    merged = {key: value for key, value in content.items() if key in known}
    merged.update(content.get(stage, {}))
    merged.update({key: value for key, value in flags.items() if value is not None})
    return merged


def build_config(kind: type[StageT], fields: Mapping[str, Any]) -> StageT:
    """Make a stage's configuration, reading bit widths and recipes from their short forms.

    Raises:
        UsageError: A bit width or a recipe does not exist.
        ValidationError: A value does not fit its field.
    """
    resolved = dict(fields)
    if "bits" in resolved and not isinstance(resolved["bits"], (BitWidth, tuple)):
        resolved["bits"] = BitWidth.parse(str(resolved["bits"]))
    if resolved.get("recipe") is not None:
        resolved["recipe"] = load_recipe(_recipe_name(resolved["recipe"]))
    return kind.model_validate(resolved)


def configure_select(execution: Execution, recipe: str | None, **flags: Any) -> SelectConfig:
    """The selection's configuration, whose defaults are those of a recipe where one is named."""
    chosen = recipe or execution.from_file("reconstruct", "recipe")
    defaults = {} if chosen is None else load_recipe(_recipe_name(chosen)).select.model_dump(exclude_none=True)
    given = execution.configure(SelectConfig, "select", **flags)
    merged = {**defaults, **given.model_dump(exclude_unset=True)}
    return SelectConfig.model_validate(merged)


def configure_reconstruct(
    execution: Execution, recipe: str | None, bits: str | None, **flags: Any
) -> ReconstructConfig:
    """The reconstruction's configuration, with the recipe `default` where none is named.

    Raises:
        UsageError: No bit width is given.
    """
    if bits is None and execution.from_file("reconstruct", "bits") is None:
        raise UsageError("reconstruct needs --bits.", hint="edadm reconstruct --bits w4a8")
    if recipe is None and execution.from_file("reconstruct", "recipe") is None:
        recipe = "default"
    return execution.configure(ReconstructConfig, "reconstruct", recipe=recipe, bits=bits, **flags)


def _recipe_name(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"A recipe is the name of one or a TOML file of its own; got {value!r}.",
            hint="edadm reconstruct --recipe default",
        )
    return value


def bits_of(execution: Execution, flag: str | None, kind: str) -> BitWidth:
    """The bit width of a command that continues a run: the flag's, the file's, or the run's last."""
    given = flag or execution.from_file(execution.command, "bits")
    return BitWidth.parse(str(given)) if given else bits_used_last(execution.run_used_last(), kind)


def parse_bits(texts: list[str] | None) -> list[BitWidth]:
    """Bit widths from a repeatable option whose values may hold several, in order and each once.

    Raises:
        UsageError: One is not of the form `wXaY`.
    """
    widths = [BitWidth.parse(part) for text in texts or () for part in text.split(",")]
    return list(dict.fromkeys(widths))


def _check_known(path: Path, key: str, known: bool) -> None:
    if not known:
        raise UsageError(f"The configuration {path} has an unknown key '{key}'.", hint="edadm --help")
