"""Identities of version 0.1 stay: digests of what it hashed are written down here, and never follow the code.

A digest that differs means that every artifact of that kind which users have on disk is refused as "made with other
settings". A new field takes `identity="if_changed"` in `edadm_cli.config`, or `later(...)` in `edadm_cli.recipe`.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from edadm_cli.artifacts.identity import canonical_json
from edadm_cli.config import (
    BenchConfig,
    BitWidth,
    CollectConfig,
    EvaluateConfig,
    ExportConfig,
    ReconstructConfig,
    SampleConfig,
    SelectConfig,
    StageConfig,
)
from edadm_cli.recipe import LayerRule, Recipe, later, without_later_defaults
from edadm_cli.reconstruct.hyperparameters import resolve

BITS = BitWidth.parse("w4a8")
RECIPE = Recipe(name="plain", layers=(LayerRule(pattern="*.conv", weight_bits=8),))


def digest(fields: dict[str, Any]) -> str:
    return sha256(canonical_json(fields)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CollectConfig(model="m"), "1fb2c9f61e1f7870"),
        (SelectConfig(), "4c256d7e0eb0aebe"),
        (ReconstructConfig(bits=BITS, recipe=RECIPE), "53997f6e45cf792c"),
        (ExportConfig(bits=BITS), "744efb040dad7b10"),
        (EvaluateConfig(bits=BITS), "3722f35c298d45c9"),
        (SampleConfig(bits=BITS), "99da9a932293efc4"),
        (BenchConfig(bits=(BITS,)), "f1a627b2097b3b31"),
        (BenchConfig(bits=(BITS,), model="m", recipe=RECIPE), "a965ec411b60ee73"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, StageConfig) else "",
)
def test_a_configuration_without_new_settings_has_the_identity_of_version_0_1(
    config: StageConfig, expected: str
) -> None:
    assert digest(config.identity_fields()) == expected


def test_so_have_the_hyperparameters() -> None:
    assert digest(resolve(RECIPE.learn, None, BITS).identity_fields()) == "aeecefd5c9fd8ec8"


class Rule(BaseModel):
    model_config = ConfigDict(frozen=True)

    pattern: str
    note: str = later("")


class Rules(BaseModel):
    model_config = ConfigDict(frozen=True)

    rules: tuple[Rule, ...] = ()
    by_name: dict[str, Rule] = {}
    more: tuple[Rule, ...] = later(())


def test_a_later_field_is_left_out_wherever_its_table_is() -> None:
    def fields(rule: Rule, **others: Any) -> dict[str, Any]:
        model = Rules(rules=(rule,), by_name={"a": rule}, **others)
        return without_later_defaults(model, model.model_dump(mode="json"))

    assert fields(Rule(pattern="x")) == {"rules": [{"pattern": "x"}], "by_name": {"a": {"pattern": "x"}}}
    noted = {"pattern": "x", "note": "n"}
    assert fields(Rule(**noted), more=(Rule(pattern="y"),)) == {
        "rules": [noted],
        "by_name": {"a": noted},
        "more": [{"pattern": "y"}],
    }
