"""Configuration files in TOML and YAML, read as plain data of bounded size, depth and values.

A file is checked to be small before it is used, because the time of parsers grows with the length of names and the
depth of tables, and Python's integers have no limit.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edadm_cli.errors import InputError, MachineError, UsageError

MAX_BYTES = 256 * 1024
MAX_YAML_BYTES = 64 * 1024  # whose parser is slower
MAX_DEPTH = 16
MAX_ENTRIES = 20_000
MAX_CHARACTERS = 4000
MAX_INTEGER = 2**63 - 1


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Reads a TOML file, which the user wrote: it is part of the command, as its flags are.

    Args:
        path: The file.
        what: Description of the file in messages, such as "The recipe".

    Raises:
        UsageError: The file cannot be read, is not TOML, or exceeds the limits.
        MachineError: Permission is denied.
    """
    try:
        content = tomllib.loads(_read_text(path, what, MAX_BYTES))
        require_bounded(content, f"{what} {path}")
    except InputError as error:
        raise UsageError(error.message, error.hint) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"{what} {path} is not readable TOML: {_reason(error)}.") from error
    return content


def read_yaml(path: Path, what: str) -> Any:
    """Reads a YAML file; dates are read as texts, and aliases are refused.

    Raises:
        InputError: The file cannot be read, is not plain YAML, or exceeds the limits.
        MachineError: Permission is denied.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Reads dates as texts: configurations have no dates, and invalid dates would raise other errors."""

    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.items()
    PlainLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in resolvers
    }
    try:
        text = _read_text(path, what, MAX_YAML_BYTES)
        _require_plain_events(yaml.parse(text, Loader=PlainLoader), f"{what} {path}")
        content = yaml.load(text, Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{what} {path} is not readable as plain YAML: {_reason(error)}.") from error
    require_bounded(content, f"{what} {path}")
    return content


def require_bounded(content: Any, what: str) -> None:
    """Refuses plain data that is nested too deeply, or has too many or too large values.

    Raises:
        InputError: There is such a value.
    """
    for number, (value, depth) in enumerate(_values(content)):
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested more than {MAX_DEPTH} levels deep.")
        if number > MAX_ENTRIES:
            raise InputError(f"{what} has more than {MAX_ENTRIES} values.")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise InputError(f"{what} holds an integer beyond 2^63.")
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise InputError(f"{what} holds a text of {len(value)} characters; at most {MAX_CHARACTERS} are read.")


def _read_text(path: Path, what: str, max_bytes: int) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{what} {path} is not a file.")
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(f"{what} {path} has {size} bytes; at most {max_bytes} are read.")
        return path.read_bytes().decode("utf-8")
    except PermissionError as error:
        raise MachineError(f"{what} {path} cannot be read: permission is denied.") from error
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {(error.strerror or str(error)).lower()}.") from error


def _require_plain_events(events: Iterator[Any], what: str) -> None:
    """Refuses aliases and deep nesting before anything is built from a YAML file."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{what} uses an alias ('*{event.anchor[:80]}'), which is not read.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested more than {MAX_DEPTH} levels deep.")


def _values(content: Any) -> Iterator[tuple[Any, int]]:
    """Yields every key and value of nested plain data with its depth, without recursion."""
    pending = [(content, 0)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        if isinstance(value, dict):
            pending.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple, set)):
            pending.extend((part, depth + 1) for part in value)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    text = " ".join(str(error).split())
    if "set_int_max_str_digits" in text:  # Python's advice to programmers
        return "it holds an integer of thousands of digits"
    return text[:300].rstrip(".")
