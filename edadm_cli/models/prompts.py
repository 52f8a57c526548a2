"""The prompts of a batch of images: from the user's file, or the model's own."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.loading import LoadedModel
from edadm_cli.models.sampling import takes_prompts

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARACTERS = 4000


def resolve_prompts(model: LoadedModel, path: Path | None, num_prompts: int, seed: int) -> list[str] | None:
    """Prompts for `num_prompts` images; `None` for a model that takes none.

    A file with more lines gives its first ones, a file with fewer is gone through again.

    Raises:
        UsageError: There is a file, and the model takes no prompts.
        InputError: The file is not usable, or the model needs prompts and has none of its own.
    """
    if not takes_prompts(model.pipeline):
        if path is not None:
            raise UsageError(f"{model.ref.id} takes no prompts, so --prompts has no meaning for it.")
        return None
    if path is not None:
        lines = read_prompts(path)
        return [lines[i % len(lines)] for i in range(num_prompts)]
    if model.entry.prompts == "digits":
        from edadm_cli.models.digits.data import prompts

        return prompts(num_prompts, seed)
    raise InputError(
        f"{model.ref.id} makes images from prompts and has none of its own.",
        hint="--prompts FILE, one prompt a line",
    )


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt a line; empty lines are passed over.

    Raises:
        InputError: The file is missing, too large, not UTF-8, empty, or has a line too long to be a prompt.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"The prompt file {path} has {size} bytes; at most {MAX_FILE_BYTES} are read.")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt file {path} is not UTF-8: byte {error.start} does not decode.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"The prompt file {path} cannot be read: {reason}.") from error
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        prompt = line.strip()
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"Line {number} of the prompt file {path} has {len(prompt)} characters; "
                f"a prompt has at most {MAX_PROMPT_CHARACTERS}."
            )
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"The prompt file {path} holds no prompt; one a line was wanted.")
    return prompts
