"""The weight files of a component: one form of them is chosen, and exactly that form is checked, hashed and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.errors import InputError
from edadm_cli.models.sources.files import read_json_object, regular_file

VARIANTS = (None, "fp16", "bf16", "fp32")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True)
class WeightFiles:
    """The chosen weight files of a component.

    Attributes:
        files: The safetensors files: one, or the shards that an index lists.
        index: The index of sharded weights; `None` for one file.
        variant: Infix of the files' names when only such files exist (`fp16`).
    """

    files: tuple[Path, ...]
    index: Path | None
    variant: str | None


def find_weights(root: Path, folder: Path, name: str, stem: str) -> WeightFiles:
    """Chooses and checks the weight files of a component; the files without a variant come first.

    Args:
        root: The model's folder, with its own links resolved.
        folder: The component's folder.
        name: The component's name, for messages.
        stem: Start of the names of its weight files, such as `diffusion_pytorch_model`.

    Raises:
        InputError: There are none, only pickles, several that differ, or broken ones.
    """
    for variant in VARIANTS:
        infix = "" if variant is None else f".{variant}"
        whole = regular_file(root, folder / f"{stem}{infix}.safetensors")
        names = dict.fromkeys((f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors.index.json"))
        indexes = [path for path in (regular_file(root, folder / file) for file in names) if path is not None]
        if whole is None and not indexes:
            continue
        shards = [_shards(root, index) for index in indexes]
        choices = {files for files in (*shards, *(((whole,),) if whole is not None else ())) if files}
        if len(choices) > 1:
            listed = " and ".join(str(path) for path in (whole, *indexes) if path is not None)
            raise InputError(
                f"{listed} name different weights for '{name}', and which of them count is not known.",
                hint="remove the files that do not belong to the model",
            )
        if whole is not None:
            read_tensor_header(whole)
            return WeightFiles((whole,), None, variant)
        _require_complete(indexes[0], shards[0])
        return WeightFiles(shards[0], indexes[0], variant)
    raise _no_weights(folder, name, stem)


def _no_weights(folder: Path, name: str, stem: str) -> InputError:
    """Returns the error for a component without weight files, which says what its folder has in their place."""
    files = sorted(path.name for path in folder.iterdir())
    pickle = next((file for file in files if Path(file).suffix in PICKLES), None)
    if pickle is not None:
        return InputError(
            f"{folder / pickle} is a pickle, which can carry code and is not read; "
            f"{stem}.safetensors was expected beside it for '{name}'."
        )
    others = [file for file in files if file.endswith(".safetensors")]
    there = f"; it has {', '.join(others[:3])}" if others else ""
    return InputError(
        f"{folder} has no {stem}.safetensors, which '{name}' needs{there}.",
        hint=f"rename {others[0]} to {stem}.safetensors if it holds these weights" if others else None,
    )


def _shards(root: Path, index: Path) -> tuple[Path, ...]:
    """Returns the files that an index of sharded weights lists.

    Raises:
        InputError: The index is broken, or a file is missing.
    """
    weight_map = read_json_object(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise InputError(f"{index} does not list the files of a sharded checkpoint.")
    shards = []
    for name in sorted(names):
        shard = regular_file(root, index.parent / name)
        if shard is None:
            raise InputError(f"{index.parent / name} is missing, though {index.name} lists it.")
        shards.append(shard)
    return tuple(shards)


def _require_complete(index: Path, shards: tuple[Path, ...]) -> None:
    """Checks the header of every shard: each tensor is in the file where the index places it, and in no other."""
    held = {shard.name: set(read_tensor_header(shard)) for shard in shards}
    for tensor, shard in read_json_object(index)["weight_map"].items():
        if tensor not in held[shard]:
            raise InputError(f"{index.parent / shard} lacks the tensor '{tensor}', which {index.name} places there.")
    seen: dict[str, str] = {}
    for shard, tensors in held.items():
        for tensor in sorted(tensors):
            if seen.setdefault(tensor, shard) != shard:
                raise InputError(
                    f"{index.parent} holds the tensor '{tensor}' twice, in {seen[tensor]} and in {shard}, "
                    "and which of them counts is not known."
                )
