"""Estimates: measuring leaves no trace, what is fitted is found again, and the arithmetic counts what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.errors import InputError
from edadm_cli.estimates import unit_timing
from edadm_cli.estimates.cost_model import CostFit, Size
from edadm_cli.estimates.reconstruct import _rows, _stored_outputs, probe
from edadm_cli.models.units import Unit
from edadm_cli.recipe import AttentionRecipe, Recipe
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace
from edadm_cli.reconstruct.call_signatures import Shapes, noted_shapes, probe_units
from edadm_cli.reconstruct.capture_groups import capture_groups
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.rows import RowType

MakeSetting = Callable[..., Any]
ROWS = 10  # five samples in two branches
BUDGET = 2**28


def _setting(made: Any, learning: Callable[[Unit], bool] = lambda unit: True) -> ReconstructionContext:
    actual = made.units()
    chosen = [unit for unit in actual if learning(unit)]
    return ReconstructionContext(made.network, made.traced, made.plan, actual, chosen, made.batches)


def _estimate(made: Any, setting: ReconstructionContext, **changes: Any) -> Any:
    hyperparameters = made.hyperparameters.model_copy(update=changes)
    return probe(setting, made.recipe.ranges, hyperparameters, BUDGET)


@pytest.fixture
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward and work whose times are known: a second a row and unit, and between units; what a unit takes."""

    def time_forward(denoiser: Any, units: Any, kept: Any, batches: Any) -> unit_timing.Forward:
        one = batches.few(1)
        (args, kwargs), *_ = iter(one)
        with noted_shapes(denoiser, units) as shapes, torch.no_grad():
            denoiser(*args, **kwargs)
        begins = {unit.name: 2.0 * number + 1 for number, unit in enumerate(units)}
        ends = {name: begin + 1 for name, begin in begins.items()}
        return unit_timing.Forward(1, 2.0 * len(units) + 1, begins, ends, shapes, {})

    def time_units(units: Any, measure: Any, limit_s: float) -> dict[str, dict[str, tuple[int, float]]]:
        seconds = {"weights": 0.0, "activations": 3.0, "search": 6.0, "nearest": 0.0, "freeze": 0.0, "frozen": 2.0}
        if limit_s > 6:
            seconds = {"setup": 0.0, "evaluation": 5.0, "step": 7.0}
        return {work: {unit.name: (1, spent) for unit in units} for work, spent in seconds.items()}

    monkeypatch.setattr("edadm_cli.estimates.reconstruct.time_forward", time_forward)
    monkeypatch.setattr("edadm_cli.estimates.reconstruct.time_units", time_units)
    monkeypatch.setattr("edadm_cli.estimates.reconstruct.chosen_units", lambda units, context: list(units))


@pytest.mark.usefixtures("by_formula")
def test_the_arithmetic_counts_calls_passes_and_steps(make_setting: MakeSetting) -> None:
    made = make_setting()
    setting = _setting(made)
    number = len(setting.units)
    # Batches of 3 and 2 samples; work that grows with the rows takes so many seconds a row and unit.
    searches = 6 * number  # per batch of 6 rows, or once
    ranges = ROWS * (3 * number + number + 1) + searches * ROWS / 6
    forms = 3 * (2 * number + 1)
    exact = ROWS * 2 * number  # all units in one pass, to the end of the last
    # a pass runs the previous unit, which is no stub yet, and what is outside of all earlier units
    quantized = ROWS * sum(2 * (before > 0) + before + 1 for before in range(number))
    targets = ROWS * number
    evaluations = 3 * ROWS * 5 * number
    steps = 6 * 5 * 7 * number  # iterations, rows
    expected = ranges + forms + exact + quantized + targets + evaluations + steps
    assert _estimate(made, setting).seconds == pytest.approx(expected)
    assert _estimate(made, setting, layer_loss_weight=0.0).seconds == pytest.approx(expected - targets)
    assert _estimate(made, setting, iterations=60).seconds == pytest.approx(expected + 9 * steps)
    assert _estimate(made, replace(setting, learning=[])).seconds == pytest.approx(ranges)
    pooled = made.recipe.ranges.model_copy(update={"pooled": True})
    seconds = probe(setting, pooled, made.hyperparameters, BUDGET).seconds
    assert seconds == pytest.approx(expected - searches * ROWS / 6 + searches)


@pytest.mark.usefixtures("by_formula")
def test_units_that_learn_pay_for_those_before_them(make_setting: MakeSetting) -> None:
    made = make_setting()
    first, last = (
        _estimate(made, _setting(made, lambda unit, name=name: unit.name == name)).seconds  # type: ignore[misc]
        for name in (made.units()[0].name, made.units()[-1].name)
    )
    behind = len(made.units()) - 1
    assert last - first == pytest.approx(ROWS * (2 + 3) * behind)  # a full-precision pass and a quantized one


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, 2**28])
def test_passes_are_counted_as_they_are_made(make_setting: MakeSetting, tmp_path: Path, budget: int) -> None:
    made = make_setting(iterations=1)
    forms = probe_units(made.denoiser, made.units(), made.batches)
    stored, _ = _stored_outputs(_setting(made), made.hyperparameters, forms, budget)
    planned = capture_groups(made.units(), forms, ROWS, budget - max(stored.values()), with_layers=True)
    workspace = Workspace(made.cache(tmp_path, budget), UnitCheckpoints(tmp_path))
    reconstruction = BlockReconstruction(
        made.network, made.plan, made.nearest(), made.batches, made.hyperparameters, 0, workspace
    )
    reconstruction.run(made.units(), lambda _: None)
    assert reconstruction.passes["full_precision"] == len(planned)
    assert reconstruction.passes["quantized"] == len(made.units())


@pytest.mark.parametrize("budget", [60_000, 2**28])
def test_rows_in_memory_are_counted_as_they_are_held(
    make_setting: MakeSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    made, held = make_setting(iterations=1), [0]
    setting, cache = _setting(made), made.cache(tmp_path, budget)
    forms = probe_units(made.denoiser, made.units(), made.batches)
    stored, _ = _stored_outputs(setting, made.hyperparameters, forms, budget)
    planned, _ = _rows(setting, made.hyperparameters, forms, stored, budget)
    allocate = cache.allocate

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows = allocate(*args, **kwargs)
        held.append(cache.used)
        return rows

    monkeypatch.setattr(cache, "allocate", counted)
    reconstruction = BlockReconstruction(
        made.network,
        made.plan,
        made.nearest(),
        made.batches,
        made.hyperparameters,
        0,
        Workspace(cache, UnitCheckpoints(tmp_path)),
    )
    reconstruction.run(made.units(), lambda _: None)
    assert max(stored.values()) > 0
    assert planned == pytest.approx(max(held), rel=0.1)


@pytest.mark.usefixtures("processor_clock")
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_a_probe_leaves_the_network_as_it_was(make_setting: MakeSetting, granularity: str) -> None:
    recipe = Recipe(name="attention", attention=AttentionRecipe(quantize=True))
    made = make_setting(recipe=recipe)
    actual = made.units(granularity)
    setting = ReconstructionContext(made.network, made.traced, made.plan, actual, actual, made.batches)
    (args, kwargs), *_ = iter(made.batches)
    modules = dict(made.denoiser.named_modules())
    processors = {name: module.processor for name, module in made.traced.attentions.items()}
    before = made.denoiser(*args, **kwargs)[0]
    estimate = probe(setting, made.recipe.ranges, made.hyperparameters, BUDGET)
    assert torch.equal(made.denoiser(*args, **kwargs)[0], before)
    assert dict(made.denoiser.named_modules()) == modules
    assert {name: module.processor for name, module in made.traced.attentions.items()} == processors
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in modules.values())
    assert 0 < estimate.seconds < 60
    assert estimate.memory_mib > 0
    assert estimate.disk_mib > 0


def test_every_kind_is_measured_and_of_each_the_lightest_first(make_setting: MakeSetting) -> None:
    setting = _setting(make_setting())
    order = unit_timing.chosen_units(setting.units, setting)
    kinds = {unit_timing.kind_of(unit) for unit in setting.units}
    assert {"Conv2d", "Linear", "ResnetBlock2D", "BasicTransformerBlock"} == kinds
    first = {unit_timing.kind_of(unit): setting.num_weights(unit) for unit in order[: len(kinds)]}
    assert set(first) == kinds
    assert all(first[unit_timing.kind_of(unit)] <= setting.num_weights(unit) for unit in setting.units)
    assert len(set(order)) == len(order) <= 12


def test_units_are_measured_until_the_time_is_over(make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    actual, clock = make_setting().units(), iter(range(100))
    monkeypatch.setattr(unit_timing.time, "perf_counter", lambda: float(next(clock)))
    measured = unit_timing.time_units(actual, lambda unit: {"step": (4, 1.0)}, limit_s=2.0)
    assert list(measured["step"]) == [unit.name for unit in actual[:6]]
    assert len(unit_timing.time_units(actual, lambda unit: {"step": (4, 1.0)}, limit_s=-1.0)["step"]) == 4


def test_one_forward_shows_the_form_that_two_prove(make_setting: MakeSetting) -> None:
    made = make_setting()
    actual = made.units()
    proven = probe_units(made.denoiser, actual, made.batches)
    (args, kwargs), *_ = iter(made.batches)  # three samples, six rows
    with noted_shapes(made.denoiser, actual) as shapes, torch.no_grad():
        made.denoiser(*args, **kwargs)
    assert {name: actual.form(name, 6) for name, actual in shapes.items()} == proven
    with pytest.raises(InputError, match="No input tensor of 'block' has a row"):
        Shapes(inputs=[RowType((7, 4), torch.float32)]).form("block", 6)


def test_few_rows_are_one_batch_of_what_there_is(make_setting: MakeSetting) -> None:
    batches = make_setting().batches  # five samples in batches of three, two branches
    for rows, expected in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (100, 6)):
        few = batches.few(rows)
        (args, _), *more = iter(few)
        assert not more
        assert len(args[0]) == few.num_rows == expected


def _sizes() -> dict[str, Size]:
    numbers = [(0.1, 5, 3), (0.4, 1, 3), (0.2, 9, 6), (0.3, 2, 1), (0.8, 7, 2)]
    return {f"unit{i}": Size("odd" if i % 2 else "even", *number) for i, number in enumerate(numbers)}


def test_a_law_finds_what_the_seconds_were_made_of() -> None:
    sizes = _sizes()

    def seconds(name: str, rows: int) -> float:
        return 3 * sizes[name].forward * rows + 0.5 * sizes[name].weights

    measured = {name: (rows, seconds(name, rows)) for name, rows in (("unit0", 1), ("unit1", 4), ("unit2", 2))}
    law = CostFit(sizes, measured, ("forward", "weights", "layers"))
    for name in sizes:
        assert law.seconds(name, 32) == pytest.approx(seconds(name, 32))


def test_a_law_has_no_negative_part_and_needs_one_unit_only() -> None:
    sizes = _sizes()
    shrinking = {name: (1, 10.0 - size.weights) for name, size in sizes.items()}
    law = CostFit(sizes, shrinking, ("weights", "layers"))
    assert all(law.seconds(name) >= 0 for name in sizes)
    alone = CostFit(sizes, {"unit1": (2, 4.0)}, ("forward", "weights"))
    assert alone.seconds("unit1", 6) == pytest.approx(12.0)
    assert alone.seconds("unit4", 2) == pytest.approx(8.0)
    assert CostFit(sizes, {"unit1": (2, 0.0)}, ("forward",)).seconds("unit4", 3) == 0.0


def test_units_keep_their_own_ratio_to_the_law_and_lend_it_to_their_kind() -> None:
    sizes = {
        "plain": Size("Conv2d", 1.0, 1, 1),
        "block": Size("ResnetBlock2D", 1.0, 1, 1),
        "other": Size("ResnetBlock2D", 2.0, 1, 1),
        "third": Size("Attention", 1.0, 1, 1),
    }
    law = CostFit(sizes, {"plain": (1, 1.0), "block": (1, 3.0)}, ("forward",))
    assert law.seconds("plain") == pytest.approx(1.0)
    assert law.seconds("block") == pytest.approx(3.0)
    assert law.seconds("other") == pytest.approx(6.0)
    assert 1.0 < law.seconds("third") < 3.0
