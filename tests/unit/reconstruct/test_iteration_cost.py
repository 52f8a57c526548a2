"""The study of a step's cost compares like with like: without drops both versions have the same loss and gradients."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from edadm_cli.recipe import AttentionRecipe, Recipe

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "iteration_cost.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("iteration_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["up_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0"])
def test_both_versions_take_the_same_step(make_setting: Callable[..., Any], study: ModuleType, name: str) -> None:
    recipe = Recipe(name="test", attention=AttentionRecipe(quantize=True))
    setting = make_setting(recipe=recipe, input_drop=0.0, activation_drop=0.0, rounding_regularizer=0.0)
    unit = setting.unit(name)
    exact_unit, learner = copy.deepcopy(unit.module), study.make_learner(setting, unit)
    learner.set_iteration(0)
    versions = (
        study.make_step(learner, _still(learner)),
        study.ThreeForwards(learner, exact_unit, _still(learner)),
    )
    losses, gradients = [], []
    for step in versions:
        losses.append(float(step()))
        gradients.append(learner.learned.rounding.variables.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def _still(learner: Any) -> Any:
    """An optimizer that takes no step."""
    optimization = learner.optimization()
    optimization.decay = lambda: optimization.set_rates(0.0)
    return optimization
