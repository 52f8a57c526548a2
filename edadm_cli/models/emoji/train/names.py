"""Gives each thing one name, as words, in all picture sets.

The sets write names in different ways, such as `flag-for-bahamas`, `judge-medium-dark` and `redheart`.
"""

from __future__ import annotations

import re
from collections import Counter

_TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
_SETS_WITH_SHORT_TONES = ("fluent-emoji", "fluent-emoji-flat")
_SET_WITHOUT_HYPHENS = "fxemoji"
_SET_WITH_VARIANTS = "streamline-emojis"
_LONGEST_WORD = 20


def words_of(icon: str, picture_set: str, icons: set[str]) -> str:
    """Returns the name of an icon as words with single spaces.

    Args:
        icon: The icon's name in its set, such as `woman-teacher-medium`.
        picture_set: The set, such as `fluent-emoji`; some sets shorten skin tones or number their variants.
        icons: All icon names of the set.
    """
    name = icon.lower()
    if picture_set in _SETS_WITH_SHORT_TONES:
        for tone in _TONES:
            if name.endswith(f"-{tone}") and name.removesuffix(f"-{tone}") in icons:
                name += "-skin-tone"
                break
    if picture_set == _SET_WITH_VARIANTS:
        name = re.sub(r"(?<=[a-z])-\d+$", "", name)
    name = re.sub(r"^flag-for-(flag-)?", "flag-", name)
    return " ".join(name.replace("_", "-").split("-"))


class WordSplitter:
    """Splits a name that is written without hyphens into words that other sets use.

    It prefers splits with few unknown words, above all few short ones, then those with the fewest words, and then those
    with the most frequent words.
    """

    def __init__(self, names: list[str]) -> None:
        self._counts = Counter(word for name in names for word in name.split() if word.isalpha())

    def __call__(self, text: str) -> str:
        """Returns `text` with spaces between its words, such as `red heart` for `redheart`."""
        return " ".join(word for part in re.findall(r"[a-z]+|\d+", text) for word in self._split(part))

    def _split(self, text: str) -> list[str]:
        best: list[tuple[int, int, int, list[str]]] = [(0, 0, 0, [])]
        for end in range(1, len(text) + 1):
            options = []
            for start in range(max(0, end - _LONGEST_WORD), end):
                word = text[start:end]
                known = word.isdigit() or (self._counts[word] > 0 and (len(word) > 2 or self._counts[word] > 20))
                unknown, length, rank, words = best[start]
                missing = 0 if known else len(word) + (30 if len(word) > 3 else 60)
                options.append((unknown + missing, length + 1, rank - self._counts[word], [*words, word]))
            best.append(min(options))
        return best[-1][3]


def is_without_hyphens(picture_set: str) -> bool:
    """Returns whether the names of a set are written without hyphens."""
    return picture_set == _SET_WITHOUT_HYPHENS
