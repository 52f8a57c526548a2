"""Weights of random models: the same numbers whatever the device does at a time, nearly normal, one stream per seed."""

from __future__ import annotations

import pytest
import torch

from edadm_cli.models import random_numbers
from edadm_cli.models.random_numbers import fill_nearly_normal


def test_values_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = torch.empty(7, 1000), torch.empty(7, 1000)
    fill_nearly_normal(whole, 3)
    monkeypatch.setattr(random_numbers, "_CHUNK", {"cpu": 999})
    fill_nearly_normal(pieces, 3)
    assert torch.equal(whole, pieces)


def test_values_are_nearly_normal_and_independent_of_those_of_the_next_seed() -> None:
    values, others = torch.empty(2**18), torch.empty(2**18)
    fill_nearly_normal(values, 3, gain=2.0, mean=1.0)
    fill_nearly_normal(others, 4)
    standard = (values - 1) / 2
    assert float(standard.mean()) == pytest.approx(0, abs=0.01)
    assert float(standard.std()) == pytest.approx(1, abs=0.01)
    assert float((standard.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.03)
    assert float((standard[1:] * standard[:-1]).mean()) == pytest.approx(0, abs=0.01)
    assert float((standard * others).mean()) == pytest.approx(0, abs=0.01)
