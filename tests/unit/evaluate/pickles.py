"""A pickle that runs code, which no file of weights may do."""

from __future__ import annotations

from pathlib import Path


class CreatesFile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)
