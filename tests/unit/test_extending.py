"""The examples of docs/extending.md do what the page says of them; `engines/test_extending_page` runs its engine."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edadm_cli.errors import MachineError
from edadm_cli.recipe import load_recipe
from edadm_cli.select.strategies import ScoredSteps

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """Everything that the page's Python defines, by name."""
    defined: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(block, "extending.md", "exec"), defined)
    return defined


class Images:
    """Three images of two levels, in two batches."""

    def __len__(self) -> int:
        return 3

    def pairs(self) -> Iterator[tuple[torch.Tensor, None]]:
        yield torch.full((2, 3, 4, 4), 10), None
        yield torch.full((1, 3, 4, 4), 40), None


def test_the_metric_is_the_mean_level(examples: dict[str, Any]) -> None:
    value = examples["MeanLevel"]().compute(SimpleNamespace(images=Images()), None)
    assert (value.value, value.num_images) == (20, 3)


def test_the_strategy_takes_more_samples_from_noisy_steps(examples: dict[str, Any]) -> None:
    steps = ScoredSteps(torch.arange(9, -1, -1), torch.zeros(10), torch.zeros(10), 1.0)
    counts = examples["Early"]().counts(steps, 110, torch.Generator())
    assert int(counts.sum()) == 110
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts[0] > counts[-1]


def test_the_contender_names_the_package_that_is_missing(examples: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match="'my-tool', which is not installed here") as caught:
        examples["MyTool"]().require(CPU)
    assert caught.value.hint == "pip install my-tool"


def test_the_transform_leaves_the_product(examples: dict[str, Any]) -> None:
    transform, weight, x = examples["Reverse"](), torch.randn(8, 12), torch.randn(5, 12)
    torch.testing.assert_close(transform.apply(x, {}, -1) @ transform.fold(weight, {}).T, x @ weight.T)


def test_the_recipe_and_the_metadata_are_read(tmp_path: Path) -> None:
    tables = re.findall(r"^```toml\n(.*?)^```", PAGE, re.M | re.S)
    recipes = [text for text in tables if text.startswith("extends")]
    assert recipes
    for text in recipes:
        (tmp_path / "mine.toml").write_text(text)
        assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"
    groups = set(re.findall(r"`(edadm\.[a-z]+)`", PAGE))
    package = tomllib.loads(tables[0])["project"]["entry-points"]
    assert package.keys() <= groups
