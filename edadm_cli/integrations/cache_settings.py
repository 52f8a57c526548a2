"""Reads the value of `--cache`; `caching` puts the cache that it names on a denoiser."""

from __future__ import annotations

from dataclasses import dataclass

from edadm_cli.engine_config import CACHE_NAMES
from edadm_cli.errors import UsageError

FIRST_BLOCK, TAYLORSEER = CACHE_NAMES
_DEFAULTS = {FIRST_BLOCK: 0.08, TAYLORSEER: 3.0}


@dataclass(frozen=True)
class StepCache:
    """A step cache and its threshold or interval.

    Attributes:
        name: `first-block` or `taylorseer`.
        value: For `first-block`, the mean relative change of the first block's residual below which the other blocks
            are skipped; for `taylorseer`, the number of steps from one computed step to the next.
    """

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> StepCache:
        """Reads `NAME` or `NAME:VALUE`.

        Raises:
            UsageError: There is no such cache, or the value has no meaning for it.
        """
        name, _, number = text.partition(":")
        if name not in _DEFAULTS:
            raise UsageError(f"There is no cache '{name[:40]}': expected {FIRST_BLOCK}[:0.08] or {TAYLORSEER}[:3].")
        try:
            value = float(number) if number else _DEFAULTS[name]
        except ValueError as error:
            raise UsageError(f"The value of a cache is a number, as in {name}:{_DEFAULTS[name]:g}.") from error
        is_interval = value >= 2 and value.is_integer()
        if not (is_interval if name == TAYLORSEER else 0 < value < 10):
            expected = "a whole number of steps from 2" if name == TAYLORSEER else "a threshold between 0 and 10"
            raise UsageError(f"--cache {name} takes {expected}; {number} was given.")
        return cls(name, value)
