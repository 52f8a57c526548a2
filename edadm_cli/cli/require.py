"""`--require 'KEY>=NUMBER'`: checks a number of a command's JSON object.

A key is dotted (`distance_to_full_precision.psnr_db`). It is looked up from the top, then among the metrics, and an
object with a `value` stands for that value: `prompt_accuracy` is `metrics.prompt_accuracy.value`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edadm_cli.errors import RequirementError, UsageError, did_you_mean

_FORM = re.compile(r"^\s*([A-Za-z_][\w.-]*?)\s*(>=|<=|==|>|<)\s*([^\s<>=]+)\s*$")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Requirement:
    """One comparison."""

    text: str
    key: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Reads `KEY>=NUMBER`.

        Raises:
            UsageError: The text does not have this form.
        """
        match = _FORM.match(text)
        bound = _number(match[3]) if match else None
        if match is None or bound is None:
            raise UsageError(
                f"--require takes KEY>=NUMBER (or <=, >, <, ==); got '{text}'.",
                hint="edadm evaluate --require 'prompt_accuracy>=0.99'",
            )
        return cls(text=text.strip(), key=match[1], comparison=match[2], bound=bound)

    def check(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Compares the number, and returns the outcome as the JSON object contains it; an unknown one is not met."""
        _, value = self._find(result)
        met = value is not None and _OPERATORS[self.comparison](value, self.bound)
        return {"require": self.text, "value": value, "met": met}

    def problem(self, result: Mapping[str, Any]) -> UsageError | None:
        """Returns the failure that says which numbers there are; `None` if the result has the one that is meant."""
        if self._find(result)[0]:
            return None
        known = sorted(_numbers(result))
        return UsageError(
            f"--require '{self.text}': the result has no number '{self.key}'; it has {', '.join(known)}.",
            hint=next((f"did you mean '{key}'?" for key in known if key.endswith(f".{self.key}")), None)
            or did_you_mean(self.key, known),
        )

    def _find(self, result: Mapping[str, Any]) -> tuple[bool, float | None]:
        """Returns whether the result has the number, and the number, which may be unknown."""
        for root in (result, result.get("metrics", {})):
            exists, value = _look_up(root, self.key.split("."))
            if isinstance(value, Mapping) and "value" in value:
                value = value["value"]
            if exists and (value is None or isinstance(value, (int, float))):
                return True, None if value is None else float(value)
        return False, None


def parse_requirements(texts: Iterable[str] | None) -> list[Requirement]:
    """Reads every `--require`, before any work is done."""
    return [Requirement.parse(text) for text in texts or ()]


def first_problem(requirements: Iterable[Requirement], result: Mapping[str, Any]) -> UsageError | None:
    """Returns the first failure of requirements that name a number which the result does not have."""
    problems = (requirement.problem(result) for requirement in requirements)
    return next((problem for problem in problems if problem is not None), None)


def unmet(outcomes: Iterable[Mapping[str, Any]]) -> RequirementError | None:
    """Returns the failure that names the requirements that were not met; `None` if all were met."""
    missed = [f"{outcome['require']} (got {_show(outcome['value'])})" for outcome in outcomes if not outcome["met"]]
    if not missed:
        return None
    return RequirementError(f"Not met: {', '.join(missed)}.")


def _show(value: float | None) -> str:
    return "no value" if value is None else f"{value:.6g}"


def _number(text: str) -> float | None:
    if text in _WORDS:
        return _WORDS[text]
    try:
        number = float(text)
    except ValueError:
        return None
    return None if number != number else number


def _look_up(root: Any, parts: list[str]) -> tuple[bool, Any]:
    for part in parts:
        if not isinstance(root, Mapping) or part not in root:
            return False, None
        root = root[part]
    return True, root


def _numbers(result: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in result.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, Mapping)):
            yield f"{prefix}{key}"
