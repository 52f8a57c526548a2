"""The identity of an artifact: stable under order, moved by every fact that decides the content."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edadm_cli.artifacts.identity import canonical_json, compute_identity, differences

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


def _facts() -> dict[str, Any]:
    return {
        "kind": "select",
        "config": {"strategy": "tdac", "num_samples": 64},
        "seed": 0,
        "parents": [("collect", "a" * 64)],
        "fingerprint": "f",
    }


@given(st.dictionaries(st.text(), _JSON, max_size=5))
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_refuses_numbers_that_json_lacks(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": number})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "collect"),
        ("config", {"strategy": "tdac", "num_samples": 65}),
        ("config", {"strategy": "tdac"}),
        ("seed", 1),
        ("parents", [("collect", "b" * 64)]),
        ("parents", []),
        ("fingerprint", "g"),
        ("schema_version", 2),
    ],
)
def test_every_fact_moves_the_identity(key: str, value: Any) -> None:
    assert compute_identity(**_facts()) == compute_identity(**_facts())
    assert compute_identity(**_facts()) != compute_identity(**{**_facts(), key: value})


def test_differences_name_nested_keys_with_both_values() -> None:
    old = {"learn": {"iterations": 100, "drop": 0.5}, "bits": "w4a8", "gone": 1}
    new = {"learn": {"iterations": 300, "drop": 0.5}, "bits": "w4a8", "added": None}
    assert differences(old, new) == [
        "added: absent -> null",
        "gone: 1 -> absent",
        "learn.iterations: 100 -> 300",
    ]
    assert differences(old, old) == []


def test_long_values_are_reported_by_their_beginning() -> None:
    (reported,) = differences({"sha": "a" * 64}, {"sha": "b" * 64})
    assert reported == f'sha: "{"a" * 36}... -> "{"b" * 36}...'
    (reported,) = differences({"sha": "a" * 64}, {"sha": "a" * 63 + "b"})
    assert reported, "values that differ beyond what is shown differ all the same"
