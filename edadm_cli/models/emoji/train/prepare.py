"""Prepares the training data: SVG texts, names, caption tokens and a data card, from the npm archive `@iconify/json`.

The archive holds only data, and nothing in it is run. `npm pack @iconify/json@2.2.535` downloads it.

    python -m edadm_cli.models.emoji.train.prepare --archive iconify-json-2.2.535.tgz --out prepared

The folder receives `pictures.json.xz` (the SVG texts), `index.json` (names, styles and split), `tokens.npz` and
`tokenizer/`. It receives `card.json` (counts, licences and hashes) last, so that a folder with the card of an archive
is up to date with that archive.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy

from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.emoji.captions import MAX_TOKENS, STYLES, captions_of
from edadm_cli.models.emoji.train.names import WordSplitter, is_without_hyphens, words_of
from edadm_cli.models.emoji.train.tokenizer import build_tokenizer

PICTURES, INDEX, TOKENS, TOKENIZER, CARD = "pictures.json.xz", "index.json", "tokens.npz", "tokenizer", "card.json"
HELD_OUT_SHARE = 0.05
_LEAST_OTHER_NAMES = 3
_SPLIT_SEED = "emoji split 0"
_HIDDEN = "hidden"


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the picture sets that are used, by name, and what `collections.json` says about them.

    Raises:
        InputError: The archive is missing, or a set is not in it.
    """
    if not path.is_file():
        raise InputError(f"There is no archive {path}.", hint="npm pack @iconify/json@2.2.535")
    members = {f"package/json/{name}.json": name for name in STYLES} | {"package/collections.json": ""}
    parts: dict[str, Any] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in members and (file := archive.extractfile(member)) is not None:
                parts[members[member.name]] = json.load(file)
    if missing := set(members.values()) - set(parts):
        raise InputError(f"The archive {path} lacks the picture sets {', '.join(sorted(missing))}.")
    collections = parts.pop("")
    return {name: parts[name] for name in STYLES}, {name: collections[name] for name in STYLES}


def svg_of(icon: dict[str, Any], picture_set: dict[str, Any]) -> str:
    """Returns an icon as a complete SVG text with a white square behind it."""
    left, top = (float(icon.get(side, picture_set.get(side, 0))) for side in ("left", "top"))
    width, height = (float(icon.get(side, picture_set.get(side, 16))) for side in ("width", "height"))
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    box = f"{left:g} {top:g} {side:g} {side:g}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def build_rows(sets: dict[str, Any]) -> list[dict[str, str]]:
    """Returns one row per picture: set, icon, name and SVG text; hidden icons are left out."""
    rows: list[dict[str, str]] = []
    for set_name, content in sets.items():
        icons = {name: icon for name, icon in content["icons"].items() if not icon.get(_HIDDEN)}
        for icon_name, icon in icons.items():
            name = words_of(icon_name, set_name, set(icons))
            rows.append({"set": set_name, "icon": icon_name, "name": name, "svg": svg_of(icon, content)})
    splitter = WordSplitter([row["name"] for row in rows if not is_without_hyphens(row["set"])])
    for row in rows:
        if is_without_hyphens(row["set"]):
            row["name"] = splitter(row["name"])
    return rows


def held_out_names(names: list[str]) -> set[str]:
    """Returns a seeded twentieth of the names, all of whose words occur in at least three other names that stay.

    A name with a word that no other name has, such as `sheep`, asks for something that no other picture shows. A model
    that is trained on nothing else cannot sample it, so such names stay in the training data.
    """
    unique = sorted(set(names))
    counts = Counter(word for name in unique for word in set(name.split()))
    num_held_out = round(HELD_OUT_SHARE * len(unique))
    order = random.Random(_SPLIT_SEED).sample(unique, len(unique))
    chosen: set[str] = set()
    for name in order:
        words = set(name.split())
        if len(chosen) < num_held_out and all(counts[word] > _LEAST_OTHER_NAMES for word in words):
            chosen.add(name)
            counts.subtract(words)
    return chosen


def card_of(rows: list[dict[str, str]], held_out: set[str], licences: dict[str, Any], archive: Path) -> dict[str, Any]:
    """Returns the data card: the source, and the counts, licence and author of each set."""
    sets = {}
    for name, style in STYLES.items():
        pictures = [row for row in rows if row["set"] == name]
        info = licences[name]
        sets[name] = {
            "style": style,
            "pictures": len(pictures),
            "held_out_pictures": sum(row["name"] in held_out for row in pictures),
            "licence": info["license"]["spdx"],
            "licence_url": info["license"].get("url"),
            "author": info["author"]["name"],
            "author_url": info["author"].get("url"),
            "sha256": hashlib.sha256("".join(row["svg"] for row in pictures).encode()).hexdigest(),
        }
    return {
        "source": "npm @iconify/json 2.2.535",
        "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "pictures": len(rows),
        "names": len({row["name"] for row in rows}),
        "held_out_names": len(held_out),
        "held_out_pictures": sum(row["name"] in held_out for row in rows),
        "sets": sets,
    }


def prepare(archive: Path, out: Path) -> dict[str, Any]:
    """Writes the prepared folder and returns its card."""
    sets, licences = read_archive(archive)
    rows = build_rows(sets)
    held_out = held_out_names([row["name"] for row in rows])
    card = card_of(rows, held_out, licences, archive)
    if (out / CARD).is_file() and json.loads((out / CARD).read_text()) == card:
        return card
    out.mkdir(parents=True, exist_ok=True)
    captions = [captions_of(row["name"], STYLES[row["set"]]) for row in rows]
    tokenizer = build_tokenizer([c for row, c in zip(rows, captions, strict=True) if row["name"] not in held_out])
    tokenizer.save_pretrained(out / TOKENIZER)
    flat = [caption for group in captions for caption in group] + [""]
    tokens = tokenizer(
        flat, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    numpy.savez_compressed(
        out / TOKENS,
        captions=tokens[:-1].reshape(len(rows), -1, MAX_TOKENS).astype(numpy.int16),
        empty=tokens[-1].astype(numpy.int16),
    )
    index = {
        "sets": [row["set"] for row in rows],
        "icons": [row["icon"] for row in rows],
        "names": [row["name"] for row in rows],
        "held_out": sorted(held_out),
    }
    (out / INDEX).write_text(json.dumps(index))
    packed = json.dumps([row["svg"] for row in rows]).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 28}]
    (out / PICTURES).write_bytes(lzma.compress(packed, format=lzma.FORMAT_XZ, filters=filters))
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return card


def main() -> int:
    """Prepares the data, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Prepare the training data of the emoji models.")
    parser.add_argument("--archive", type=Path, required=True, help="the file that npm pack @iconify/json wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prepared data")
    options = parser.parse_args()
    try:
        print(json.dumps(prepare(options.archive, options.out), indent=2))
    except EdadmError as error:
        print(f"{error.message}\n{error.hint or ''}".rstrip(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
