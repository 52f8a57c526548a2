"""The models that ship with the package: their folders, the parts that they share, and their prompts."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.models.digits import data as digits
from edadm_cli.models.emoji import data as emoji


def shipped_folder(name: str) -> Path:
    """Returns the folder of a shipped model.

    Raises:
        UsageError: There is no such model.
        InputError: Its files are missing.
    """
    return emoji.model_folder(name) if name in emoji.PIPELINES else digits.model_folder(name)


def shared_parts(folder: Path) -> dict[str, Path]:
    """Returns the folders of those components that a shipped pipeline shares with another one, by component.

    A folder outside this package shares nothing, so that no model can name files that are not its own.
    """
    return emoji.shared_parts(folder) if folder.parent == emoji.WEIGHTS.resolve() else {}


def shipped_prompts(source: str, num_prompts: int, seed: int) -> list[str]:
    """Returns prompts of a shipped model, whose source is `digits` or `emoji`.

    Raises:
        UsageError: The number is negative.
    """
    return {"digits": digits.prompts, "emoji": emoji.prompts}[source](num_prompts, seed)
