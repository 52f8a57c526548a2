"""Bit widths of weights and activations, in the notation of the command line and the artifacts."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edadm_cli.errors import UsageError
from edadm_cli.recipe import later

_BITS = re.compile(r"^w([2-8])(?:g(\d{1,4}))?a([2-8])$")
_AVERAGE_BITS = re.compile(r"^(?:auto:|w)([2-8](?:\.\d{1,2})?)(?:g(\d{1,4}))?a([2-8])$")
_SIZE_BITS = re.compile(r"^(?:auto:|w)(\d{1,5}(?:\.\d{1,3})?)mib(?:(?:g(\d{1,4}))?a([2-8]))?$")

SMALLEST_GROUP, LARGEST_GROUP = 8, 1024
LARGEST_GROUPED_BITS = 4
"""Weights of more bits have no groups: the product of a code and a multiplier would not fit eight bits."""


class BitWidth(BaseModel):
    """Bits of weights and activations, written `w4a8`.

    `w4g32a8` has a multiplier per 32 weights, `w4.5a8` is an average over layers with different bits, and `w1.5miba8` a
    size of the denoiser's file. In `w4.25g32a8` the layers of at most four bits have groups of 32 weights, and the
    average includes their multipliers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: int = Field(ge=2, le=8)
    activation: int = Field(ge=2, le=8)
    average: float | None = later(
        None, ge=2, le=8, description="bits per weight on average, where layers have their own; null: all have `weight`"
    )
    size_mib: float | None = later(
        None, gt=0, description="largest size of the quantized denoiser in MiB, where layers have their own bits"
    )
    group_size: int | None = later(
        None,
        ge=SMALLEST_GROUP,
        le=LARGEST_GROUP,
        description="weights per group that has a multiplier of its own; null: no groups",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        return value if isinstance(value, (dict, BitWidth)) else cls.parse(str(value)).model_dump()

    @classmethod
    def parse(cls, text: str) -> BitWidth:
        """Reads `wXaY`, `wXgGaY`, an average such as `auto:4.5a8`, or a size such as `auto:1.5MiB`, also with groups.

        Raises:
            UsageError: The text does not have such a form, X or Y is not from 2 to 8, or groups are not possible.
        """
        plain = text.strip().lower()
        if match := _BITS.match(plain):
            if match[2] is not None and int(match[1]) > LARGEST_GROUPED_BITS:
                raise _not_groups(text)
            return cls(weight=int(match[1]), activation=int(match[3]), group_size=_group_size(text, match))
        if (match := _SIZE_BITS.match(plain)) and float(match[1]) > 0:
            size, groups = float(match[1]), _group_size(text, match)
            return cls(weight=4, activation=int(match[3] or 8), size_mib=size, group_size=groups)
        match = _AVERAGE_BITS.match(plain)
        if match is None or float(match[1]) > 8:
            raise _not_a_width(text)
        average = float(match[1])
        return cls(weight=int(average), activation=int(match[3]), average=average, group_size=_group_size(text, match))

    @classmethod
    def parse_several(cls, text: str) -> tuple[BitWidth, ...]:
        """Reads bit widths with commas between them, in order and each once.

        Raises:
            UsageError: One of them does not have the form `wXaY`.
        """
        return tuple(dict.fromkeys(cls.parse(part) for part in text.split(",")))

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f"g{self.group_size}"
        if self.size_mib is not None:
            return f"w{_short(self.size_mib)}mib{groups}a{self.activation}"
        return f"w{self.weight if self.average is None else _short(self.average)}{groups}a{self.activation}"

    @property
    def is_mixed(self) -> bool:
        """Whether layers have different bits, by their measured sensitivity."""
        return self.average is not None or self.size_mib is not None


def _short(number: float) -> str:
    """Returns a number with the three decimals that `BitWidth.parse` reads, without zeros at the end."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _group_size(text: str, match: re.Match[str]) -> int | None:
    """Returns the group size that a width names, if any.

    Raises:
        UsageError: Groups cannot have this size.
    """
    if match[2] is None:
        return None
    if not SMALLEST_GROUP <= int(match[2]) <= LARGEST_GROUP:
        raise _not_groups(text)
    return int(match[2])


def _not_a_width(text: str) -> UsageError:
    if "," in text:
        return UsageError(
            f"--bits takes one width here, such as w4a8; got '{text}'.",
            hint="edadm run and edadm bench take several at once",
        )
    return UsageError(
        "--bits takes the bits of weights and activations, 2 to 8 each: w4a8, w4g32a8 with groups of weights, or"
        f" auto:4.5a8 and auto:1.5MiB for an average and a size; got '{text}'.",
        hint="edadm reconstruct --bits w4a8",
    )


def _not_groups(text: str) -> UsageError:
    return UsageError(
        f"Groups have from {SMALLEST_GROUP} to {LARGEST_GROUP} weights of at most {LARGEST_GROUPED_BITS} bits each,"
        f" such as w4g32a8; got '{text}'.",
        hint="edadm reconstruct --bits w4g32a8",
    )
