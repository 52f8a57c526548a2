"""One unit's learning: it starts at nearest rounding, it helps, it repeats, and what it gives is what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edadm_cli.processes import Processes
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import quantized_layer
from edadm_cli.quant.network import fill_layer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.recipe import AttentionRecipe, RangeRecipe, Recipe, TransformRule
from edadm_cli.reconstruct.capture import layer_outputs
from edadm_cli.reconstruct.trainable_layers import Drop, LearnedLayer, Share
from edadm_cli.reconstruct.trainer import UnitLearner
from edadm_cli.reconstruct.unit_data import EVALUATED_ROWS, UnitData, channel_loss, layer_targets

MakeSetting = Callable[..., Any]
Learner = Callable[..., UnitLearner]
RESIDUAL = "up_blocks.0.resnets.0"
TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0"
ALONE = "down_blocks.0.downsamplers.0.conv"
ATTENTION = Recipe(name="attention", attention=AttentionRecipe(quantize=True))
BUDGET = 2**28


@pytest.fixture
def learner_of(tmp_path: Path) -> Callable[..., UnitLearner]:
    """`learner_of(setting, unit name, seed)`."""

    def make(setting: Any, name: str, seed: int = 0) -> UnitLearner:
        unit, cache = setting.unit(name), setting.cache(tmp_path)
        with setting.network.full_precision():
            (exact,) = setting.capture([unit], cache)
        (quantized,) = setting.capture([unit], cache, with_outputs=False)
        gamma = setting.hyperparameters.layer_loss_weight
        targets = layer_targets(setting.network, unit, exact, 5, cache) if gamma else {}
        data = UnitData(exact, quantized, targets)
        return UnitLearner(setting.network, unit, setting.plan, setting.ranges, data, setting.hyperparameters, seed)

    return make


def _chosen(learner: UnitLearner) -> list[int]:
    """Returns the rows of the first iteration, sampled again."""
    order = torch.Generator().manual_seed(0)
    rows = learner.data.quantized.rows
    return torch.randint(rows, (learner.hyperparameters.batch_size,), generator=order).tolist()


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_without_iterations_weights_are_rounded_to_nearest(make_setting: MakeSetting, learner_of: Learner) -> None:
    setting = make_setting(iterations=0)
    nearest, result = setting.nearest(), learner_of(setting, RESIDUAL).learn()
    assert result.losses.loss_before == result.losses.loss_after
    for name, tensor in result.params.items():
        assert torch.equal(tensor, nearest[name]), name


@pytest.mark.parametrize("name", [RESIDUAL, TRANSFORMER, ALONE])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_learning_lowers_the_loss(make_setting: MakeSetting, learner_of: Learner, name: str, drop: float) -> None:
    setting = make_setting(
        "w3a4",
        ATTENTION,
        iterations=40,
        batch_size=10,
        weight_learning_rate=0.3,
        input_drop=drop,
        activation_drop=drop,
    )
    result = learner_of(setting, name).learn()
    assert result.losses.loss_after < 0.98 * result.losses.loss_before
    assert 1 <= len(result.losses.curve) <= 40


def test_what_is_learned_is_what_is_deployed(make_setting: MakeSetting, learner_of: Learner) -> None:
    """With a growing sharpness h is 0 or 1 when it is rounded, so the deployed loss is the soft loss."""
    fields = {"iterations": 300, "batch_size": 10, "layer_loss_weight": 0.0}
    results = {}
    for sharpness in (1.0, 20.0):
        setting = make_setting("w4a8", rounding_sharpness=sharpness, **fields)
        results[sharpness] = learner_of(setting, RESIDUAL).learn()
        setting.restore()
    plain, sharp = results[1.0], results[20.0]
    assert plain.losses.loss_soft is not None
    assert sharp.losses.loss_soft is not None
    assert plain.losses.undecided is not None
    assert sharp.losses.undecided is not None
    assert sharp.losses.loss_after == pytest.approx(sharp.losses.loss_soft, rel=0.05)
    assert plain.losses.loss_after > 1.2 * plain.losses.loss_soft
    assert sharp.losses.loss_after < plain.losses.loss_after
    assert sharp.losses.undecided < 0.05 < plain.losses.undecided


def test_a_unit_that_learning_makes_worse_keeps_its_nearest_rounding(
    make_setting: MakeSetting, learner_of: Learner
) -> None:
    setting = make_setting("w4a8", iterations=3, weight_learning_rate=100.0, activation_learning_rate=50.0)
    nearest, result = setting.nearest(), learner_of(setting, RESIDUAL).learn()
    assert result.losses.is_nearest
    assert result.losses.loss_after == result.losses.loss_before
    assert all(torch.equal(tensor, nearest[name]) for name, tensor in result.params.items())


def test_learned_codes_are_within_one_of_nearest_and_scales_stay_positive(
    make_setting: MakeSetting, learner_of: Learner
) -> None:
    setting = make_setting("w4a4", iterations=20, weight_learning_rate=0.5, activation_learning_rate=5.0)
    nearest, learner = setting.nearest(), learner_of(setting, RESIDUAL)
    learner.learn()
    params = learner.learned.params()  # such rates make the unit worse, so that its result is nearest rounding
    codes = [name for name in params if name.endswith("weight_int")]
    assert len(codes) == 5, "conv1, time_emb_proj, conv2, and two parts of conv_shortcut"
    changed = 0
    for name in codes:
        difference = (params[name].int() - nearest[name].int()).abs()
        assert difference.max() <= 1
        changed += int(difference.sum())
    assert changed > 0
    for name, tensor in params.items():
        if name.endswith("_scale"):
            assert bool((tensor > 0).all())
        if name.endswith(("weight_scale", "zero_point")):
            assert torch.equal(tensor, setting.ranges[name]), "these are not learned"


@pytest.mark.parametrize("relative", [False, True])
def test_one_step_is_one_forward_and_its_loss_is_the_sum_of_the_terms(
    make_setting: MakeSetting, learner_of: Learner, relative: bool
) -> None:
    setting = make_setting(
        input_drop=0.0,
        activation_drop=0.0,
        rounding_regularizer=0.0,
        layer_loss_weight=0.7,
        relative_layer_losses=relative,
    )
    learner, forwards = learner_of(setting, RESIDUAL), []
    handle = learner.module.register_forward_hook(lambda *_: forwards.append(1))
    learner.set_iteration(0)
    loss = float(learner.loss().detach())
    assert len(forwards) == 1
    handle.remove()
    rows, exact, unit = _chosen(learner), learner.data.full_precision, learner.unit
    args, kwargs = exact.call([tensor.read(rows) for tensor in learner.data.quantized.tensors])
    inner = unit.layers[:-1]
    with layer_outputs(setting.denoiser, inner) as outputs, torch.no_grad():
        out = learner.module(*args, **kwargs)
    with setting.network.full_precision(), layer_outputs(setting.denoiser, inner) as expected, torch.no_grad():
        args, kwargs = exact.call([tensor.read(rows) for tensor in exact.tensors])
        target = unit.module(*args, **kwargs)
    sizes = dict.fromkeys(inner, 1.0)
    if relative:
        (whole,) = exact.outputs
        assert whole.count <= EVALUATED_ROWS, "sizes are those of all rows then"
        everything = {name: rows.read(range(rows.count)) for name, rows in learner.data.layer_targets.items()}
        block = whole.read(range(whole.count)).square().sum(1).mean()
        sizes = {name: float(block / tensor.square().sum(1).mean()) for name, tensor in everything.items()}
    terms = sum(sizes[name] * float(channel_loss(outputs[name], expected[name])) for name in inner)
    assert loss == pytest.approx(float(channel_loss(out, target)) + 0.7 * terms, rel=1e-4)


def test_inputs_are_mixed_from_both_networks(make_setting: MakeSetting, learner_of: Learner) -> None:
    """QDrop: with probability one the exact inputs are used, with zero the quantized network's."""
    seen: dict[float, Tensor] = {}
    for share in (0.0, 0.5, 1.0):
        setting = make_setting(input_drop=share, layer_loss_weight=0.0)
        learner = learner_of(setting, "conv_out")
        for rows in learner.data.quantized.tensors:
            rows.write(range(rows.count), torch.full((rows.count, *rows.kind.shape), 100.0))
        learner.module.register_forward_pre_hook(lambda _, args, share=share: seen.update({share: args[0]}))
        learner.set_iteration(0)
        learner.loss()
        seen[-share - 1] = learner.data.full_precision.tensors[0].read(_chosen(learner))
        setting.restore()
    assert bool((seen[0.0] == 100).all())
    assert torch.equal(seen[1.0], seen[-2.0])
    foreign = seen[0.5] == 100
    assert 0.4 < float(foreign.float().mean()) < 0.6
    assert torch.equal(seen[0.5][~foreign], seen[-1.5][~foreign])


def test_a_layer_that_learns_has_the_element_type_that_diffusers_looks_for() -> None:
    """Blocks of Kandinsky 6 cast to it; a layer without a bias has no parameter left while it learns."""
    from diffusers.models.modeling_utils import get_parameter_dtype

    layer = torch.nn.Linear(4, 4, bias=False)
    drop = Drop(0.0, torch.Generator(), Share(0, 1, 1))
    learned = LearnedLayer(Operation.of(layer), LayerPlan(weight_bits=8), None, None, drop, {})
    assert not list(learned.parameters())
    assert get_parameter_dtype(learned) == torch.float32
    assert not learned.state_dict()


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_masks_are_true_as_often_as_asked(probability: float) -> None:
    drop = Drop(probability, torch.Generator().manual_seed(0), Share(0, 1, 1))
    mask = drop.mask(torch.zeros(100, 501))
    if probability == 0:
        assert mask is None
        return
    assert mask is not None
    assert mask.shape == (100, 501)
    assert float(mask.float().mean()) == pytest.approx(probability, abs=0.01)
    drop.active = False
    assert drop.mask(torch.zeros(3)) is None


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_rows_share_one_mask(count: int) -> None:
    rows, x = 5, torch.zeros(5, 3, 7)
    whole = Drop(0.5, torch.Generator().manual_seed(1), Share(0, rows, rows)).mask(x)
    shares = []
    for index in range(count):
        team = Processes()
        team.index, team.count = index, count
        shares.append(Share.of(rows, team))
    assert [share.start for share in shares[1:]] == [share.stop for share in shares[:-1]]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    pieces = [Drop(0.5, torch.Generator().manual_seed(1), share).mask(x[share.start : share.stop]) for share in shares]
    assert whole is not None
    assert torch.equal(torch.cat([piece for piece in pieces if piece is not None]), whole)
    # heads of attention multiply the first dimension, rows stay together
    heads = Drop(0.5, torch.Generator().manual_seed(1), shares[0]).mask(torch.zeros(2 * shares[0].size, 3, 7))
    assert heads is not None
    assert len(heads) == 2 * shares[0].size


def test_a_mask_of_a_tensor_without_rows_has_its_shape() -> None:
    shared = torch.ones(1, 5)  # such as an embedding of all rows, whose size their number does not divide
    for share in (Share(0, 2, 2), Share(2, 4, 4)):
        mask = Drop(0.5, torch.Generator().manual_seed(1), share).mask(shared)
        assert mask is not None
        assert mask.shape == shared.shape


@pytest.mark.parametrize("name", [RESIDUAL, TRANSFORMER])
def test_a_seed_decides_every_byte(make_setting: MakeSetting, learner_of: Learner, denoiser: Any, name: str) -> None:
    params, curves = [], []
    for seed in (0, 0, 1):
        setting = make_setting(recipe=ATTENTION, input_drop=0.5, activation_drop=0.5, weight_learning_rate=0.5)
        learner = learner_of(setting, name, seed)
        curves.append(learner.learn().losses.curve)
        params.append(learner.learned.params())
        setting.restore()
    assert _same(params[0], params[1])
    assert curves[0] == curves[1]
    assert not _same(params[0], params[2])


SCALED = ATTENTION.model_copy(update={"transforms": (TransformRule(name="input-channel-scale"),)})
PER_CHANNEL = {"channel_values": ("weight-scale", "bias", "input-channel-scale"), "channel_learning_rate": 0.01}


@pytest.mark.parametrize("fields", [{}, PER_CHANNEL], ids=["layers", "channels"])
@pytest.mark.parametrize("name", [RESIDUAL, TRANSFORMER])
def test_what_is_deployed_computes_what_was_decided(
    make_setting: MakeSetting, learner_of: Learner, name: str, fields: dict[str, Any]
) -> None:
    setting = make_setting("w3a8", SCALED, iterations=25, batch_size=10, rounding_sharpness=20.0, **fields)
    learner = learner_of(setting, name)
    result = learner.learn()
    assert not result.losses.is_nearest
    params = result.params
    calls, unit = learner.data.quantized, learner.unit
    learner.activation_drop.active, learner.learned.decided = False, True
    learner.learned.materialize()
    args, kwargs = calls.call([rows.read(range(rows.count)) for rows in calls.tensors])
    with torch.no_grad():
        expected = setting.denoiser.get_submodule(name)(*args, **kwargs)
    for layer_name in unit.layers:
        layer = quantized_layer(setting.network.float_layers[layer_name], setting.plan.layers[layer_name])
        fill_layer(layer, layer_name, params)
        setting.network.put_layer(layer_name, layer)
    for attention in unit.attentions:
        scales = {operand: params[f"{attention}.{operand}_scale"] for operand in "qkvp"}
        processor = QuantizedAttention(setting.plan.attentions[attention], scales)
        setting.network.put_processor(attention, processor)
    with torch.no_grad():
        actual = setting.denoiser.get_submodule(name)(*args, **kwargs)
    assert torch.equal(actual, expected)


def test_ranges_may_be_shared_by_the_whole_shortcut(make_setting: MakeSetting, learner_of: Learner) -> None:
    setting = make_setting(recipe=Recipe(name="whole", ranges=RangeRecipe(channel_parts=False)), iterations=0)
    result = learner_of(setting, RESIDUAL).learn()
    assert f"{RESIDUAL}.conv_shortcut.weight_int" in result.params
    assert not any(".part" in name for name in result.params)


@pytest.mark.parametrize("name", [RESIDUAL, TRANSFORMER])
def test_a_transform_of_inputs_goes_through_learning_and_into_what_is_deployed(
    make_setting: MakeSetting, learner_of: Learner, name: str
) -> None:
    recipe = Recipe(name="scaled", transforms=(TransformRule(name="input-channel-scale"),))
    setting = make_setting("w4a6", recipe, iterations=30, batch_size=10, rounding_sharpness=20.0)
    learner = learner_of(setting, name)
    result = learner.learn()
    layer = learner.unit.layers[0]
    scale = result.params[f"{layer}.input_channel_scale"]
    assert scale.shape == (setting.network.float_weight(layer).shape[1],)
    assert bool((scale >= 1).all())
    assert bool((scale > 1).any())
    assert result.losses.loss_after < result.losses.loss_before
    if not result.losses.is_nearest:
        deployed = quantized_layer(setting.network.float_layers[layer], setting.plan.layers[layer])
        fill_layer(deployed, layer, result.params)
        learner.learned.decided = True
        learner.activation_drop.active = False
        learner.learned.materialize()
        x = learner.data.full_precision.tensors[0].read(range(2))
        if x.shape[1] == scale.shape[0] and x.dim() == 4:
            torch.testing.assert_close(deployed(x), learner.learned.modules[layer](x), atol=1e-5, rtol=1e-5)


def test_rounding_may_be_learned_before_the_scales(make_setting: MakeSetting, learner_of: Learner) -> None:
    """Two phases: the first leaves the scales and quantizes no activation, the second leaves the rounding."""
    fields = {"iterations": 20, "rounding_first": 0.5, "rate_decay": "constant", "weight_learning_rate": 0.3}
    setting = make_setting("w4a6", **fields)
    learner = learner_of(setting, RESIDUAL)
    rounding, scales = learner.phases()
    assert (rounding.start, rounding.stop, scales.start, scales.stop) == (0, 10, 10, 20)
    first = learner.learned.scales.factor.detach().clone()
    learner._learn_phase(rounding)
    assert torch.equal(learner.learned.scales.factor.detach(), first)
    alpha = learner.learned.rounding.variables.detach().clone()
    assert not torch.equal(
        learner.learned.rounding.codes()[f"{RESIDUAL}.conv1"],
        setting.nearest()[f"{RESIDUAL}.conv1.weight_int"],
    )
    learner._learn_phase(scales)
    assert torch.equal(learner.learned.rounding.variables.detach(), alpha)
    assert not torch.equal(learner.learned.scales.factor.detach(), first)


def test_only_the_hidden_state_is_mixed_where_the_recipe_says_so(
    make_setting: MakeSetting, learner_of: Learner
) -> None:
    for mixed, embedding_is_mixed in (("all", True), ("hidden", False)):
        setting = make_setting(input_drop=1.0, mixed_inputs=mixed, layer_loss_weight=0.0)
        learner = learner_of(setting, RESIDUAL)
        for rows in learner.data.quantized.tensors:
            rows.write(range(rows.count), torch.full((rows.count, *rows.kind.shape), 100.0))
        learner.set_iteration(0)
        hidden, embedding = learner._inputs()
        assert not bool((hidden == 100).any())
        assert bool((embedding == 100).all()) != embedding_is_mixed
        setting.restore()


@pytest.mark.parametrize("kind", ["weight-scale", "bias", "input-channel-scale"])
def test_values_per_channel_are_learned_where_the_recipe_says_so(
    make_setting: MakeSetting, learner_of: Learner, kind: str
) -> None:
    """Each kind alone changes its own tensors and no other of that kind, and scales stay positive at any rate."""
    fields = {"iterations": 3, "weight_learning_rate": 1e-9, "activation_learning_rate": 1e-9}
    setting = make_setting("w3a4", SCALED, channel_values=(kind,), channel_learning_rate=10.0, **fields)
    learner = learner_of(setting, RESIDUAL)
    for iteration in range(3):
        learner.set_iteration(iteration)
        learner.loss().backward()
        optimization = learner.optimization()
        optimization.adam.step()
        learner.after_step()
    params, first = learner.learned.params(), setting.ranges
    suffixes = {"weight-scale": ".weight_scale", "input-channel-scale": ".input_channel_scale"}
    for name, suffix in suffixes.items():
        keys = [key for key in params if key.endswith(suffix)]
        assert keys
        assert any(not torch.equal(params[key], first[key]) for key in keys) is (name == kind)
        assert all(bool((params[key] > 0).all()) for key in keys)
    assert any(key.endswith(".bias") for key in params) is (kind == "bias")
