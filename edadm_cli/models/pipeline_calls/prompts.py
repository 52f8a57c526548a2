"""Reads the prompts of images: from the user's file, the model's own, or the built-in captions.

The suffix of a file decides how it is read. A text file has one prompt per line; `.json` holds COCO captions (or a list
of texts); `.csv` and `.tsv` have a header and a column of prompts, which `FILE:COLUMN` names.

References:
    COCO captions, arXiv 1504.00325.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import InputError, MachineError, UsageError, quoted
from edadm_cli.models.pipeline_calls.parameters import takes_prompts
from edadm_cli.models.shipped import shipped_prompts

if TYPE_CHECKING:
    from edadm_cli.models.loaded import LoadedModel
    from edadm_cli.models.registry import ModelEntry

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PROMPT_CHARACTERS = 4000
CAPTIONS = Path(__file__).with_name("captions.txt")
CAPTIONS_NAME = "edadm-captions-256"

_PIPES = ("dev", "proc")  # folders in which a shell puts pipes with the output of another command
_TABLES = {".csv": ",", ".tsv": "\t"}
_USUAL_COLUMNS = ("caption", "prompt", "text")


def resolve_prompts(model: LoadedModel, given: list[str] | None, num_prompts: int, seed: int) -> list[str] | None:
    """Returns prompts for `num_prompts` images, as `prompts_of` does; `None` for a model that takes none.

    Args:
        model: The pipeline.
        given: The prompts of the user's file; `None` if there is no file.
        num_prompts: The number of images.
        seed: Seed of the model's own prompts.

    Raises:
        UsageError: There is a file, and the model takes no prompts.
    """
    if given is not None:
        require_prompts(model)
    return prompts_of(model.entry, given, num_prompts, seed) if takes_prompts(model.pipeline) else None


def require_prompts(model: LoadedModel) -> None:
    """Refuses a model that takes no prompts.

    Raises:
        UsageError: The model takes none.
    """
    if not takes_prompts(model.pipeline):
        raise UsageError(f"{model.ref.id} takes no prompts, so --prompts has no meaning for it.")


def prompts_of(entry: ModelEntry, given: list[str] | None, num_prompts: int, seed: int) -> list[str]:
    """Returns prompts for `num_prompts` images of a model that takes prompts.

    Of a list with more prompts than images, the first ones are used; a list with fewer is repeated.

    Args:
        entry: The model's defaults.
        given: The prompts of the user's file; `None` takes the model's own, or the built-in captions.
        num_prompts: The number of images.
        seed: Seed of the model's own prompts.
    """
    if given is None and entry.prompts is not None:
        return shipped_prompts(entry.prompts, num_prompts, seed)
    lines = read_prompts(CAPTIONS) if given is None else given
    return [lines[i % len(lines)] for i in range(num_prompts)]


def prompts_name(entry: ModelEntry, path: Path | None) -> str:
    """Returns the manifest's name for the source of a model's prompts: `file`, or the name of a built-in set."""
    return "file" if path is not None else entry.prompts or CAPTIONS_NAME


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a file; empty ones are left out.

    Args:
        path: A text file with one prompt per line; a JSON file with COCO captions, of which the first of each image
            is taken, or with a list of texts; or a table, `FILE.csv` or `FILE.csv:COLUMN`.

    Raises:
        InputError: The file is missing, too large, not UTF-8, empty, has a prompt that is too long, or is not of the
            form that its name promises.
        MachineError: Permission is denied.
    """
    file, column = _split_column(path)
    text = _read_text(file)
    if file.suffix.lower() == ".json":
        entries = _captions_of_json(file, text)
    elif file.suffix.lower() in _TABLES:
        entries = _column_of_table(file, text, column)
    else:
        entries = ((f"Line {number}", line) for number, line in enumerate(text.split("\n"), start=1))
    prompts = list(_checked(file, entries))
    if not prompts:
        raise InputError(f"The prompt file {file} holds no prompt; one per line was expected.")
    return prompts


def _split_column(path: Path) -> tuple[Path, str | None]:
    stem, colon, column = path.name.rpartition(":")
    if colon and Path(stem).suffix.lower() in _TABLES and not _exists(path):
        return path.with_name(stem), column
    return path, None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _read_text(path: Path) -> str:
    """Returns the text of a prompt file, which may be a pipe of the shell; `read_prompts` lists the errors."""
    try:
        is_piped = path.is_fifo() and path.absolute().parts[1] in _PIPES
        if not path.is_file() and path.exists() and not is_piped:
            raise InputError(f"The prompt file {path} cannot be read: it is not a regular file.")
        size = path.stat().st_size
        if size <= MAX_FILE_BYTES:
            with path.open("rb") as file:  # a pipe says that its size is 0
                content = file.read(MAX_FILE_BYTES + 1)
            size = len(content)
        if size > MAX_FILE_BYTES:
            raise InputError(f"The prompt file {path} has {size} bytes; at most {MAX_FILE_BYTES} are read.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt file {path} is not UTF-8: byte {error.start} does not decode.") from error
    except PermissionError as error:
        raise MachineError(f"The prompt file {path} cannot be read: permission is denied.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"The prompt file {path} cannot be read: {reason}.") from error


def _checked(path: Path, entries: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Yields the prompts among entries that consist of a place in the file and a text; empty ones are left out."""
    for place, entry in entries:
        prompt = entry.strip()
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"{place} of the prompt file {path} has half of a character, which no text may hold.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"{place} of the prompt file {path} has {len(prompt)} characters; "
                f"a prompt has at most {MAX_PROMPT_CHARACTERS}."
            )
        if prompt:
            yield prompt


def _captions_of_json(path: Path, text: str) -> Iterable[tuple[str, str]]:
    """Yields the place and the text of the first COCO caption of each image, or of each text of a list."""
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise InputError(f"The prompt file {path} is not readable JSON: {reason}.") from error
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"The prompt file {path} has neither COCO 'annotations' nor a list of texts.")
    seen = set()
    for number, row in enumerate(rows, start=1):
        caption = row.get("caption") if isinstance(row, dict) else row
        if not isinstance(caption, str):
            raise InputError(f"Entry {number} of the prompt file {path} has no caption.")
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, (int, str, type(None))):
            raise InputError(f"Entry {number} of the prompt file {path} has an 'image_id' that is no number.")
        if image is None or image not in seen:
            seen.add(image)
            yield f"Entry {number}", " ".join(caption.split())


def _column_of_table(path: Path, text: str, column: str | None) -> Iterable[tuple[str, str]]:
    """Yields the place and the text of each row of a column; without a name, the column is one of the usual ones."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_TABLES[path.suffix.lower()], strict=True)
    try:
        columns = reader.fieldnames or ()
        name = column or next((usual for usual in _USUAL_COLUMNS if usual in columns), None)
        if name is None or name not in columns:
            problem = f"no column '{column}'" if column else "no column called caption, prompt or text"
            raise InputError(
                f"The prompt file {path} has {problem}; it has {', '.join(columns) or 'none at all'}.",
                hint=quoted("--prompts", f"{path}:COLUMN"),
            )
        for row in reader:
            yield f"Line {reader.line_num}", " ".join((row[name] or "").split())
    except csv.Error as error:
        raise InputError(f"The prompt file {path} is not a readable table: {error}.") from error
