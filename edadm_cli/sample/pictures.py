"""The images that `edadm sample` writes: what decides each of them, and how its file is called and recognized."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edadm_cli.errors import InputError

FACTS_KEY = "edadm"
"""Key of the text in a PNG file that records the settings of the image."""
_SLUG_CHARACTERS = 48
_HASH_CHARACTERS = 8
_PLAIN_PROMPT = re.compile(r"^[a-z0-9]+( [a-z0-9]+)*$")


@dataclass(frozen=True)
class Picture:
    """Everything that decides one image."""

    seed: int
    prompt: str | None
    num_steps: int
    guidance_scale: float | None
    arithmetic: str
    export: str
    engine: str | None = None

    @property
    def file(self) -> str:
        """Returns the name of its file: the seed, the prompt, and what computed it; each prompt has its own name.

        A prompt of a few plain words is part of the name. Any other prompt is shortened to the characters that a file
        name allows, followed by the beginning of a hash of the whole prompt.
        """
        computed = self.engine or ("integer" if self.arithmetic == "integer" else "")
        parts = [f"{self.seed:06d}", _slug(self.prompt or ""), computed]
        return "-".join(part for part in parts if part) + ".png"

    def facts(self) -> str:
        """Returns the text that is written into the file, by which a later run recognizes the image."""
        return json.dumps(self._known(), sort_keys=True)

    def _known(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "engine" or value is not None}

    def differences(self, facts: str | None) -> str:
        """Returns in words how the facts in a file differ from those of this image."""
        try:
            held = json.loads(facts or "")
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict):
            return "a file that edadm did not write"
        known = self._known()
        names = [name for name in sorted(held.keys() | known.keys()) if held.get(name) != known.get(name)]
        parts = [f"its {name.replace('_', ' ')} is {held.get(name)!r} and not {known.get(name)!r}" for name in names]
        return f"another image: {', '.join(parts)}"

    def is_in(self, folder: Path) -> bool:
        """Returns whether the image is on disk already.

        Raises:
            InputError: A file with its name holds something else.
        """
        path = folder / self.file
        if not path.is_file():
            return False
        from PIL import Image

        try:
            with Image.open(path) as file:
                facts = file.info.get(FACTS_KEY)
        except Exception:  # noqa: BLE001 - each of Pillow's decoders raises other kinds of errors
            facts = None
        if facts == self.facts():
            return True
        raise InputError(f"{path} is {self.differences(facts)}.", hint="add --force to replace it")


def _slug(prompt: str) -> str:
    if not prompt:
        return ""
    text = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_CHARACTERS].rstrip("-")
    if _PLAIN_PROMPT.match(prompt) and len(prompt) <= _SLUG_CHARACTERS:
        return text
    digest = sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARACTERS]
    return f"{text}-{digest}" if text else digest
