"""Seeded damage to an artifact: one file becomes something else, in half of the mutants with a manifest that agrees."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from edadm_cli.artifacts import Manifest, read_tensor_header
from edadm_cli.errors import InputError

DIGITS = "@digits@"
"""Stands for an integer of 5,000 digits, which `json.dumps` does not write."""
VALUES: tuple[Any, ...] = (None, True, [], {}, "", "x", -1, 0, 0.5, 1e308, 10**30, float("nan"), float("inf"), DIGITS)
VALUES += ("\ud800", "nul\0", [[]], {"": None}, "../..", "a" * 100_000, [1.5, "y"], -(2**63))


@dataclass(frozen=True)
class Mutant:
    """What was done to a file.

    Args:
        file: Its name in the artifact.
        what: The change, for people to read.
        agrees: Whether the manifest was made to agree.
        is_changed: Whether the file's bytes differ from those that the manifest promises.
    """

    file: str
    what: str
    agrees: bool
    is_changed: bool


def mutate(folder: Path, seed: str) -> Mutant:
    """Damage one file of an artifact."""
    chance = random.Random(seed)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    texts = [name for name in names if name.endswith(".json")]
    name = chance.choice(texts) if chance.random() < 0.6 else chance.choice(names)
    path, agrees = folder / name, chance.random() < 0.5
    before = path.read_bytes()
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes] if chance.random() < 0.2 else [_special]
    if path.suffix == ".json":
        kinds += [_json] * 8
    if path.suffix == ".safetensors":
        kinds += [_header] * 4 + [_tensors] * 4
    what = chance.choice(kinds)(path, chance)
    is_changed = not (path.is_file() and not path.is_symlink()) or path.read_bytes() != before
    if agrees and path.is_file():
        _agree(folder, name)
    return Mutant(name, what, agrees, is_changed)


def _bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    content[place : place + chance.choice((1, 4, 64))] = chance.randbytes(chance.choice((0, 1, 8)))
    path.write_bytes(content[: chance.choice((len(content), place))])
    return f"bytes at {place}"


def _special(path: Path, chance: random.Random) -> str:
    kind = chance.choice(("pipe", "folder", "device", "nothing", "empty"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    return kind


def _json(path: Path, chance: random.Random) -> str:
    value = json.loads(path.read_bytes())
    if chance.random() < 0.05:
        path.write_text(chance.choice(("[" * 50_000, '{"a":' * 50_000, "nul", "\ufeff{}", '"\\ud800"')))
        return "no JSON of ours"
    where = ""
    node: Any = {"": value}
    key: Any = ""
    while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.8:
        node, key = node[key], chance.choice(list(node[key]) if isinstance(node[key], dict) else range(len(node[key])))
        where += f".{key}"
    action = chance.choice(("replace", "replace", "replace", "delete", "add"))
    if action == "replace":
        node[key] = copy.deepcopy(chance.choice(VALUES))
    elif action == "delete":
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(chance.choice((node[0], *VALUES))))
    else:
        node[chance.choice(("extra", "a\0b", "\ud800", "$tensor"))] = chance.choice(VALUES)
    value = node.get("") if where == "" else value
    path.write_text(json.dumps(value).replace(f'"{DIGITS}"', "7" * 5000))
    return f"{action} {where}"


def _header(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return _bytes(path, chance)
    name = chance.choice(names)
    entry = header[name]
    field = chance.choice(("dtype", "shape", "data_offsets", "name", "metadata", "length"))
    if field == "name":
        header[chance.choice(("\ud800", "a\0", ""))] = header.pop(name)
    elif field == "metadata":
        header["__metadata__"] = chance.choice(({"a": 1}, [], "x", {"a": "\ud800"}, None))
    elif field == "dtype":
        entry["dtype"] = chance.choice(("F4", "Q8", "F64", "BOOL", "F8_E4M3", 7, None, "F32" * 1000))
    elif field == "shape":
        entry["shape"] = chance.choice(([], [0], [2**62, 2**62], [-1], [1.5], "x", None, [*entry["shape"], 2]))
    elif field == "data_offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            ([end, begin], [0, 0], [-8, 0], [begin + 1, end + 1], [float(begin), end], [0, 2**64], [begin], None)
        )
    text = json.dumps(header).encode()
    size = len(text) if field != "length" else chance.choice((0, 2**63, len(text) + 5, len(text) - 5))
    path.write_bytes(size.to_bytes(8, "little") + text + rest)
    return f"header {field}"


def _tensors(path: Path, chance: random.Random) -> str:
    tensors = load_file(path)
    if not tensors:
        return _bytes(path, chance)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    action = chance.choice(("fewer rows", "no rows", "infinite", "type", "rename", "delete", "reshape", "huge"))
    if action == "fewer rows" and tensor.ndim:
        tensors[name] = tensor[:-1].clone()
    elif action == "no rows" and tensor.ndim:
        tensors[name] = tensor[:0].clone()
    elif action == "infinite" and tensor.is_floating_point():
        tensor.view(-1)[0] = chance.choice((float("inf"), float("nan")))
    elif action == "huge" and tensor.numel():
        tensor.view(-1)[0] = 1e38 if tensor.is_floating_point() else 127
    elif action == "type":
        tensors[name] = tensor.double() if not tensor.is_floating_point() else tensor.to(int)
    elif action == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    elif action == "delete":
        del tensors[name]
    else:
        tensors[name] = tensor.reshape(-1, 1).clone()
    save_file(tensors, path)
    return f"tensor {name} {action}"


def _agree(folder: Path, name: str) -> None:
    """Changes the manifest to describe the file as it is now, as someone would who hides the change."""
    path = folder / "manifest.json"
    if name == path.name:
        try:
            manifest = Manifest.model_validate_json(path.read_text())
            path.write_text(manifest.model_copy(update={"identity": manifest.expected_identity()}).model_dump_json())
        except ValueError:
            pass
        return
    content = (folder / name).read_bytes() if not (folder / name).is_symlink() else b""
    manifest = json.loads(path.read_text())
    for entry in manifest["payload"]:
        if entry["path"] == name:
            entry |= {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
            try:
                header = read_tensor_header(folder / name)
                entry["tensors"] = {key: info.model_dump(mode="json") for key, info in header.items()}
            except InputError:
                pass
    path.write_text(json.dumps(manifest))


def restore(original: Path, copied: Path) -> None:
    """Make a folder a copy of another again."""
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(original, copied)
