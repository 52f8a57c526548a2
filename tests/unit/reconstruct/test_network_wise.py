"""All units together: learning goes on from what the units learned, lowers the error of the prediction, and repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.processes import ALONE
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.recipe import AttentionRecipe, Recipe, TransformRule
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.held_back import RowSplit
from edadm_cli.reconstruct.learned_values import StraightThroughCodes
from edadm_cli.reconstruct.network_wise import WholeLearner, WholeReconstruction, step_weights, whole_denoiser
from edadm_cli.reconstruct.unit_data import UnitData

MakeSetting = Callable[..., Any]
RICH = Recipe(
    name="rich",
    attention=AttentionRecipe(quantize=True),
    transforms=(TransformRule(name="input-channel-scale"),),
)
FIELDS = {"iterations": 1, "network_iterations": 30, "network_batch_size": 6, "network_learning_rate": 0.02}


def _reconstruction(setting: Any, folder: Path) -> BlockReconstruction:
    workspace = Workspace(setting.cache(folder), UnitCheckpoints(folder))
    return BlockReconstruction(
        setting.network, setting.plan, setting.ranges, setting.batches, setting.hyperparameters, 3, workspace
    )


def _errors(setting: Any) -> list[float]:
    """Squared errors of the denoiser's predictions as it is now, one per row, relative to those of the steps."""
    errors: list[Tensor] = []
    for args, kwargs in setting.batches:
        with torch.no_grad():
            quantized = prediction_of(setting.denoiser(*args, **kwargs))
            with setting.network.full_precision():
                exact = prediction_of(setting.denoiser(*args, **kwargs))
        errors += list((quantized - exact).square().flatten(1).mean(1))
    return [float(error) for error in errors]


@pytest.mark.parametrize(("bits", "recipe"), [("w3a8", Recipe(name="plain")), ("w4a8", RICH), ("w3g8a8", None)])
def test_all_units_together_lower_the_error_of_the_prediction(
    make_setting: MakeSetting, tmp_path: Path, bits: str, recipe: Recipe | None
) -> None:
    setting = make_setting(bits, recipe, **FIELDS)
    units, reconstruction = setting.units(), _reconstruction(setting, tmp_path)
    reconstruction.run(units, lambda _: None)
    apart, before = dict(reconstruction.params), _errors(setting)
    done: list[int] = []
    losses = reconstruction.learn_together(units, len(units), setting.batches, done.append)
    after = _errors(setting)
    assert not losses.is_nearest
    assert losses.loss_before == pytest.approx(1, rel=1e-3)  # each step counts by what is left of its error
    share = [late / early for early, late in zip(before, after, strict=True)]
    assert losses.loss_after < 0.9
    assert sum(share) / len(share) < 0.9
    assert len(done) == FIELDS["network_iterations"]
    assert reconstruction.params.keys() >= apart.keys()  # learned biases may be added
    changed = [name for name in apart if not torch.equal(apart[name], reconstruction.params[name])]
    assert any(name.endswith("weight_int") for name in changed)
    assert any(name.endswith("weight_scale") for name in changed)


def test_without_a_step_everything_stays_as_the_units_learned_it(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting("w4a8", RICH, **FIELDS | {"network_learning_rate": 1e-12, "network_iterations": 2})
    hyperparameters = setting.hyperparameters.model_copy(
        update={"activation_learning_rate": 1e-12, "channel_learning_rate": 1e-12}
    )
    units, reconstruction = setting.units(), _reconstruction(setting, tmp_path)
    reconstruction.run(units, lambda _: None)
    apart = dict(reconstruction.params)
    reconstruction.hyperparameters = hyperparameters
    reconstruction.learn_together(units, len(units), setting.batches, lambda _: None)
    for name, tensor in apart.items():
        torch.testing.assert_close(reconstruction.params[name], tensor, rtol=1e-6, atol=0, msg=name)


def test_a_result_that_was_stored_is_not_learned_again(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting("w3a8", **FIELDS | {"network_iterations": 3})
    units, reconstruction = setting.units(), _reconstruction(setting, tmp_path)
    reconstruction.run(units, lambda _: None)
    first = reconstruction.learn_together(units, len(units), setting.batches, lambda _: None)
    learned = dict(reconstruction.params)
    again: list[int] = []
    setting.restore()
    resumed = _reconstruction(setting, tmp_path)
    resumed.run(units, lambda _: None)
    assert resumed.learn_together(units, len(units), setting.batches, again.append) == first
    assert again == []
    assert all(torch.equal(resumed.params[name], learned[name]) for name in learned)


def test_parts_of_a_step_have_the_loss_and_the_gradients_of_the_whole(
    make_setting: MakeSetting, tmp_path: Path
) -> None:
    setting = make_setting("w3a8", **FIELDS)
    units, cache = setting.units(), setting.cache(tmp_path)
    reconstruction = _reconstruction(setting, tmp_path)
    reconstruction.run(units, lambda _: None)
    whole = whole_denoiser(setting.network, units)
    together = WholeReconstruction(
        setting.network, setting.plan, setting.ranges, setting.batches, setting.hyperparameters
    )
    calls = together._capture(whole, cache, ALONE)
    data = UnitData(calls, calls, {}, together._row_factors(calls, cache, ALONE))
    losses, gradients = [], []
    for rows_at_once in (6, 4, 1):
        arguments = (setting.network, whole, setting.plan, setting.ranges, data)
        learner = WholeLearner(rows_at_once, 3, *arguments, together.hyperparameters, 0, ALONE, reconstruction.params)
        learner.set_iteration(0)
        loss = learner.loss()
        loss.backward()
        losses.append(float(loss))
        gradients.append(learner.learned.rounding.variables.grad.clone())
        learner.batch.close()
    # a product over other rows may add in another order, after which single codes of inputs are rounded the other way
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)
    size = gradients[0].norm()
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 0.1 * size


def test_codes_go_on_from_learned_ones_and_pass_their_gradient_on() -> None:
    weight = torch.tensor([[0.24, -0.61, 3.0, 0.02]])  # 2.4, -6.1, 30 and 0.2 codes
    learned = torch.tensor([[3, -6, 7, 0]], dtype=torch.int8)
    plan = LayerPlan(weight_bits=4, activation_bits=8)
    codes = StraightThroughCodes({"a": weight}, {"a": torch.tensor([0.1])}, {"a": plan}, None, {"a": learned})
    assert torch.equal(codes.codes()["a"], learned)
    torch.testing.assert_close(codes.variables.detach(), torch.tensor([2.55, -6.1, 7.45, 0.2]))
    weights, _ = codes.weights(decided=False)
    torch.testing.assert_close(weights["a"], learned * 0.1)
    weights["a"].sum().backward()
    torch.testing.assert_close(codes.variables.grad, torch.full((4,), 0.1))
    with torch.no_grad():
        codes.variables += torch.tensor([-2.1, 0.0, 9.0, -20.0])
    codes.keep_in_range()
    assert codes.codes()["a"].tolist() == [[0, -6, 7, -8]]
    assert codes.undecided() == 0


def test_steps_count_alike_or_by_how_far_their_errors_move_the_final_sample() -> None:
    steps = torch.tensor([0, 0, 2, 2])  # the second step has no sample
    losses = torch.tensor([0.5, 1.5, 4.0, 4.0], dtype=torch.float64)
    alike = step_weights(losses, steps, None)
    torch.testing.assert_close(alike[[0, 2]], torch.tensor([1, 0.25], dtype=torch.float64))
    by_effect = step_weights(losses, steps, torch.tensor([9.0, 1.0, 4.0]))
    shares = by_effect[[0, 2]] * torch.tensor([1.0, 4.0], dtype=torch.float64) / 2  # of the loss
    torch.testing.assert_close(shares, torch.tensor([9.0, 4.0], dtype=torch.float64) / 13)
    assert float((by_effect[steps] * losses).mean()) == pytest.approx(1)
    assert bool(step_weights(torch.zeros(4, dtype=torch.float64), steps, None)[steps].isfinite().all())


def test_an_eighth_of_the_trajectories_is_held_back() -> None:
    trajectories = [row // 3 for row in range(3 * 40)]
    split = RowSplit.of(trajectories)
    assert [trajectories[row] for row in split.compared] == [number for number in range(35, 40) for _ in range(3)]
    assert sorted([*split.learned, *split.compared]) == list(range(len(trajectories)))
    many = RowSplit.of([row % 800 for row in range(80_000)])
    assert len(many.compared) <= 1024
    assert len({row % 800 for row in many.compared} & {row % 800 for row in many.learned}) == 0
    few = RowSplit.of([0, 1, 2, 2])
    assert list(few.learned) == list(few.compared) == [0, 1, 2, 3]
    assert (split.holds_back, few.holds_back) == (True, False)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([1.0, 0.9, 0.5, 0.7, 0.8, 0.8], 2),  # before, three checks, soft and hard at the end
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.6], None),  # the end is the best
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.4], 0),  # nothing got better
    ],
)
def test_what_was_best_on_the_rows_that_were_held_back_is_kept(
    make_setting: MakeSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], kept: int | None
) -> None:
    setting = make_setting("w3a8", **FIELDS | {"network_iterations": 3})
    units, reconstruction = setting.units(), _reconstruction(setting, tmp_path)
    reconstruction.run(units, lambda _: None)
    given, states, rows = iter(losses), [], []

    def loss(learner: WholeLearner, decided: bool = True) -> float:
        states.append(learner.learned.params())
        rows.append((set(learner.rows), learner._row_parts()))
        return next(given)

    monkeypatch.setattr(WholeLearner, "reconstruction_loss", loss)
    monkeypatch.setattr(RowSplit, "of", lambda _: RowSplit([0, 1, 2], [3]))
    result = reconstruction.learn_together(units, len(units), setting.batches, lambda _: None)
    assert next(given, None) is None
    assert all(learned <= {0, 1, 2} and compared == [[3]] for learned, compared in rows)
    assert any(len(learned) > 1 for learned, _ in rows)
    expected = states[-1 if kept is None else kept]
    assert all(torch.equal(reconstruction.params[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert result.is_nearest == (kept == 0)
    assert result.loss_after == losses[-1 if kept is None else kept]
