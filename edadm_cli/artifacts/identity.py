"""The identity of an artifact: a hash of everything that decides its content, and of nothing else.

`identity = sha256(canonical JSON of {schema_version, kind, config, seed, parents, model fingerprint})`: no
times, no paths, no facts about the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA_VERSION = 1
_LONGEST_VALUE = 40


def canonical_json(value: Any) -> bytes:
    """Writes a JSON value in the one form that is hashed: sorted keys, no spaces, ASCII, finite numbers.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: A value has no JSON form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def compute_identity(
    *,
    kind: str,
    config: Mapping[str, Any],
    seed: int,
    parents: Iterable[tuple[str, str]],
    fingerprint: str,
    schema_version: int = SCHEMA_VERSION,
) -> str:
    """Returns the hash of everything that decides an artifact's content.

    Args:
        kind: The stage that builds it.
        config: Resolved fields of the stage's configuration, without those that name paths or budgets.
        seed: Seed of everything random in the stage.
        parents: `(kind, identity)` of each artifact that was read, in the stage's own order.
        fingerprint: Hash of the model's files.
        schema_version: Version of the artifact's layout.
    """
    content = {
        "schema_version": schema_version,
        "kind": kind,
        "config": dict(config),
        "seed": seed,
        "parents": [{"kind": parent, "identity": identity} for parent, identity in parents],
        "model": fingerprint,
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names the keys whose values differ, as `key: old -> new`, with dotted keys for nested tables."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}: {_short(_show(before, key))} -> {_short(_show(after, key))}"
        for key in sorted(before.keys() | after.keys())
        if _show(before, key) != _show(after, key)
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _short(text: str) -> str:
    """Returns the beginning of a hash or of a long list."""
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], sort_keys=True) if key in flat else "absent"
