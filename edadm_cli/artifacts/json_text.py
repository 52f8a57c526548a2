"""Reads and writes JSON with finite numbers of ordinary length, and text that can be printed and written."""

from __future__ import annotations

import json
import math
from typing import Any

from edadm_cli.errors import InputError

MAX_DIGITS = 40
"""Digits of the longest number that is read; the largest integer that a file of ours holds has 20."""
_SURROGATES = ("\ud800", "\udfff")


def dump_json(value: Any, indent: int | None = None) -> str:
    """Writes a value as JSON, with sorted keys.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)


def parse_json(text: str, where: str) -> Any:
    """Reads JSON from text.

    Python's own parser accepts values that are not JSON or that break later code: NaN and infinities, integers of
    thousands of digits (which cannot be printed), halves of surrogate pairs (which cannot be written) and null
    characters in keys (some of which are names of files). This function refuses all of them.

    Args:
        text: The text.
        where: The source of the text for messages, such as the path of a file.

    Raises:
        InputError: The text is not such JSON.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_no_number)
        _check_strings(value)
    except RecursionError as error:
        raise InputError(f"{where} is not readable JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise InputError(f"{where} is not readable JSON: {error}.") from error
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > 2 * MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} characters")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON has")


def _check_strings(value: Any) -> None:
    """Checks every string within a value.

    Raises:
        ValueError: A string cannot be written as UTF-8, or a key has a null character.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            _check_unicode(item)
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            for key in item:
                _check_unicode(key)
                if "\0" in key:
                    raise ValueError("a key has a null character in it")
            pending.extend(item.values())


def _check_unicode(string: str) -> None:
    if not string.isascii() and any(_SURROGATES[0] <= character <= _SURROGATES[1] for character in string):
        raise ValueError("a text has half of a surrogate pair in it")
