"""Decides which files of a model folder are read, and refuses dangerous ones before any library sees them.

A file is read when it is a regular file inside the model's folder. The Hugging Face cache stores its snapshots as links
to `blobs/`; those links are followed, and no others.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import explained_os_errors
from edadm_cli.errors import InputError, quoted

INDEX_NAME = "model_index.json"
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
DESCRIPTIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
TEMPLATES = "additional_chat_templates"
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_DESCRIPTION_BYTES = 256 * 2**20
_MAX_DEPTH = 64
# Vocabularies: their keys are tokens, and no library takes settings from them.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.json")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def regular_file(root: Path, path: Path) -> Path | None:
    """Returns `path` if it is a regular file of the model in `root`, and `None` if it does not exist.

    Args:
        root: The model's folder, with its own links resolved.
        path: A path below `root`.

    Raises:
        InputError: The path is a link that leaves the model, or is not a regular file.
    """
    with explained_os_errors(path):
        if not os.path.lexists(path):
            return None
        try:
            target = path.resolve(strict=True)
        except (FileNotFoundError, RuntimeError) as error:
            raise InputError(f"{path} is a link to a file that does not exist.") from error
        if not any(target.is_relative_to(folder) for folder in _allowed_folders(root)):
            raise InputError(
                f"{path} is a link to {target}, outside of the model's folder, and such a link is not followed.",
                hint=f"replace the link by a copy, or copy the model with: {quoted('cp', '-rL', root, 'NEW_FOLDER')}",
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise InputError(f"{path} is not a regular file; a model consists of regular files.")
    return path


def description_files(root: Path, folder: Path) -> tuple[Path, ...]:
    """Returns the files of a tokenizer or a processor that are neither weights nor code, in a fixed order.

    Raises:
        InputError: One of them is a link that leaves the model, is no regular file, or is too large.
    """
    with explained_os_errors(folder):
        places = [*folder.iterdir(), *((folder / TEMPLATES).iterdir() if (folder / TEMPLATES).is_dir() else ())]
    files = []
    for path in sorted(places):
        if path.suffix.lower() in DESCRIPTIONS and not path.is_dir() and regular_file(root, path):
            if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
                raise InputError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_DESCRIPTION_BYTES} are read.")
            files.append(path)
    return tuple(files)


def refuse_code(folder: Path) -> None:
    """Refuses a component's folder that contains program code.

    Raises:
        InputError: There is such a file.
    """
    with explained_os_errors(folder):
        code = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() in CODE), None)
    if code is not None:
        raise InputError(
            f"{code} is code that comes with the model, and such code is not run.",
            hint="remove the file if the model works without it",
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object of bounded size and depth.

    Raises:
        InputError: The file is too large, is no JSON, is nested too deeply, or holds something else than an object.
    """
    with explained_os_errors(path):
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise InputError(f"{path} has {size} bytes; at most {_MAX_CONFIG_BYTES} are read.")
        text = path.read_bytes()
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {_reason(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {_kind(content)}; a JSON object was expected.")
    for _, _, depth in entries(content):
        if depth > _MAX_DEPTH:
            raise InputError(f"{path} is nested more than {_MAX_DEPTH} levels deep.")
    return content


def refuse_requests_for_code(files: tuple[Path, ...]) -> None:
    """Refuses configurations that ask a library to fetch or run code, or to load another model.

    Raises:
        InputError: A configuration contains `auto_map`, a kernel of the hub, or a backbone of its own.
    """
    for path in files:
        if path.suffix.lower() != ".json" or path.name in _VOCABULARIES:
            continue
        for key, value, _ in entries(read_json_object(path)):
            if key in ("auto_map", "custom_pipeline", "trust_remote_code") and value:
                raise InputError(f"{path} asks for code that comes with the model ('{key}'), and such code is not run.")
            if key in _KERNELS and "/" in json.dumps(value):
                raise InputError(f"{path} asks for a kernel from the hub ('{key}'), and such code is not run.")
            if key == "use_pretrained_backbone" and value:
                raise InputError(f"{path} asks for the weights of another model ('{key}'), which are not loaded.")


def _allowed_folders(root: Path) -> tuple[Path, ...]:
    is_snapshot = root.parent.name == "snapshots"
    return (root, root.parent.parent / "blobs") if is_snapshot else (root,)


def entries(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Yields every key of nested objects with its value and its depth, without recursion."""
    pending: list[tuple[Any, int]] = [(content, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key, inner, depth
                pending.append((inner, depth + 1))
        elif isinstance(value, list):
            for inner in value:
                yield "", inner, depth
                pending.append((inner, depth + 1))


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition("; use sys.")[0]
