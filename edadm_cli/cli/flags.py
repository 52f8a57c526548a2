"""The flags of the commands: those of a stage are derived from its configuration, shared ones are defined here."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edadm_cli.config import BitWidth, ReconstructConfig, StageConfig
from edadm_cli.stage_config import RECIPE_NAMES, field_facts

Parameter = inspect.Parameter

_WHERE = "Where and how"
_OUTPUT = "Output"
_IN_EVERY_STAGE = ("seed", "device")


def parameter(name: str, kind: Any, *spellings: str, default: Any = None, **facts: Any) -> Parameter:
    """Returns a keyword parameter that Typer shows as an option.

    Args:
        name: The parameter's name.
        kind: The type of its value.
        spellings: Spellings of the option; by default its name.
        default: The value of an option that is not given.
        facts: Further arguments of `typer.Option`.
    """
    if kind in (bool, bool | None) and facts.get("metavar") is None:
        facts["metavar"] = ""  # a switch takes no value, though Typer would show one
    option = typer.Option(*(spellings or (_spelling(name),)), **facts)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def field_parameter(config: type[StageConfig], name: str) -> Parameter:
    """Returns the option of a field, with the type, spelling and help text of the configuration."""
    field, facts = config.model_fields[name], field_facts(config, name)
    kind, parser = _option_type(field.annotation)
    spellings = facts["flags"] or [_spelling(name)]
    if field.annotation is bool and field.default is True:
        spellings = [f"{spellings[0]}/--no-{spellings[0].removeprefix('--')}"]
    more = {} if parser is None else {"parser": parser}
    values = _values(name, field.annotation)
    if values:
        more["autocompletion"] = lambda incomplete: [value for value in values if value.startswith(incomplete)]
    panel = _WHERE if name in _IN_EVERY_STAGE else None
    return parameter(
        name, kind | None, *spellings, help=field.description, metavar=facts["metavar"], rich_help_panel=panel, **more
    )


def stage_parameters(config: type[StageConfig]) -> list[Parameter]:
    """Returns the options of a stage's own fields, in the order of the fields."""
    return [field_parameter(config, name) for name in config.model_fields if name not in _IN_EVERY_STAGE]


def field_values(config: type[StageConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the given flags by field; items of lists are split at commas."""
    values = {}
    for name, value in given.items():
        if name in config.model_fields and value is not None and value != []:
            values[name] = _items(value, field_facts(config, name)["split"]) if isinstance(value, list) else value
    return values


def several_bits(help_text: str) -> Parameter:
    """Returns an option for several bit widths, repeated or with commas; `widths_of` reads its value."""
    return parameter("bits", list[BitWidth] | None, help=help_text, metavar="wXaY", parser=BitWidth.parse_several)


def widths_of(value: Iterable[tuple[BitWidth, ...]] | None) -> tuple[BitWidth, ...]:
    """Returns the bit widths of an option of `several_bits`, in order and each once."""
    return tuple(dict.fromkeys(width for several in value or () for width in several))


def _spelling(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option_type(annotation: Any) -> tuple[Any, Any]:
    """Returns the type that Typer parses for a field's type, and a parser if the type has its own."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _option_type(next(part for part in arguments if part is not type(None)))
    if annotation is BitWidth:
        return BitWidth, BitWidth.parse
    if origin is tuple and arguments[-1] is Ellipsis:
        return (list[BitWidth], BitWidth.parse_several) if arguments[0] is BitWidth else (list[str], None)
    if origin is Literal:
        return str, None
    return (annotation, None) if annotation in (int, float, bool, str, Path) else (str, None)


def _values(name: str, annotation: Any) -> tuple[str, ...]:
    """Returns the values that a shell completes: those of a field that has few, and the names of recipes."""
    if name == "recipe":
        return tuple(known.strip() for known in RECIPE_NAMES.split(",")[:-1])
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    several = [_values(name, part) for part in typing.get_args(annotation)]
    return next((values for values in several if values), ())


def _items(values: list[Any], split: bool) -> tuple[Any, ...]:
    if not split:
        return tuple(values)
    parts = [value.split(",") if isinstance(value, str) else value for value in values]
    return tuple(dict.fromkeys(item.strip() if isinstance(item, str) else item for part in parts for item in part))


RECIPE = field_parameter(ReconstructConfig, "recipe")
REQUIRE = parameter(
    "require",
    list[str] | None,
    metavar="'KEY>=NUMBER'",
    help="Exit with code 5 unless this holds for the result; KEY is a metric or a dotted key of the JSON object;"
    " repeatable.",
)
OUTPUT = (
    parameter("json_output", bool, "--json", default=False, rich_help_panel=_OUTPUT, help="Print one JSON object."),
    parameter(
        "quiet",
        bool,
        "--quiet",
        "-q",
        default=False,
        rich_help_panel=_OUTPUT,
        help="Print one path, and show no progress.",
    ),
    parameter(
        "verbose",
        bool,
        "--verbose",
        "-v",
        default=False,
        rich_help_panel=_OUTPUT,
        help="Report details, and tracebacks of failures.",
    ),
)
RUN = parameter(
    "run_folder",
    Path | None,
    "--run",
    metavar="DIR",
    rich_help_panel=_WHERE,
    help="Run folder; by default $EDADM_RUN, else runs/<model> or the run that was used last.",
)
STAGE = (
    RUN,
    parameter(
        "config_file",
        Path | None,
        "--config",
        metavar="FILE.toml",
        rich_help_panel=_WHERE,
        help="Settings by name, at the top or in a table per stage; flags override them.",
    ),
    *(field_parameter(StageConfig, name) for name in _IN_EVERY_STAGE),
    parameter(
        "force",
        bool,
        default=False,
        rich_help_panel=_WHERE,
        help="Build again, and replace an artifact that has other settings.",
    ),
    parameter(
        "dry_run",
        bool,
        default=False,
        rich_help_panel=_WHERE,
        help="Report what is up to date, and estimate time, memory and disk of the rest by a short probe, which may "
        "load the model; the run does not change.",
    ),
    *OUTPUT,
)
