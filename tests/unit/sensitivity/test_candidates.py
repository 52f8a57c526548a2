"""The change of a layer's output is that of the deployed layer with its weight or its input quantized alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_activation_ranges, search_weight_scales
from edadm_cli.config import BitWidth, SensitivityConfig
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace, trace
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.recipe import load_recipe
from edadm_cli.sensitivity.candidates import LayerCandidates, layer_candidates

LEARNED = load_recipe("default")
RECIPE = LEARNED.model_copy(update={"learn": LEARNED.learn.model_copy(update={"granularity": "none"})})
CONFIG = SensitivityConfig(recipe=RECIPE, weight_bits=(3, 8), activation_bits=(4,), group_size=8)


class Net(nn.Module):
    """A convolution, one of a concatenation, a grouped one, and a linear layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.joined = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 3, stride=2)
        self.grouped, self.tokens, self.last = nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.joined(torch.cat([self.first(x), x], 1)))
        result: Tensor = self.last(self.tokens(y.flatten(2).transpose(1, 2)))
        return result


@pytest.fixture(scope="module")
def measured() -> tuple[Net, Trace, Any, dict[str, LayerCandidates]]:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    smooth = nn.functional.interpolate(torch.randn(4, 3, 4, 4), size=12, mode="bilinear")
    call: Call = ((smooth,), {})
    traced = trace(net, *call)
    full = plan_network(traced, RECIPE, BitWidth(weight=8, activation=8)).layers
    return net, traced, call, layer_candidates(CONFIG, net, traced, full, [call])


@pytest.mark.parametrize("name", ["first", "joined", "grouped", "tokens"])
def test_changes_are_those_of_the_deployed_layer(measured: Any, name: str) -> None:
    net, traced, call, candidates = measured
    layer, seen = net.get_submodule(name), []
    with Hooks() as hooks:
        hooks.before(layer, lambda _, inputs: seen.append(inputs[0]))
        net(*call[0])
    changes = candidates[name].output_changes(seen[0])
    parts = candidates[name].plan.channel_parts
    assert (parts is not None) == (name == "joined")
    plans = [
        LayerPlan(weight_bits=3, channel_parts=parts),
        LayerPlan(weight_bits=8, channel_parts=parts),
        LayerPlan(weight_bits=3, group_size=8, channel_parts=parts),
        LayerPlan(weight_bits=8, activation_bits=4, channel_parts=parts),
    ]
    assert changes.shape[1] == candidates[name].count == (3 if name == "first" else 4), "the sample stays in float"
    for number, plan in enumerate(plans[: changes.shape[1]]):
        holder, alone = nn.ModuleDict({name: layer}), QuantizationPlan(layers={name: plan})
        params = search_weight_scales(traced, alone, RECIPE.ranges)
        if plan.activation_bits is not None:
            params |= search_activation_ranges(net, traced, alone, RECIPE.ranges, [call])
        quantize_network(holder, alone)
        load_quant_params(holder, nearest_params(lambda _: layer.weight, alone, params))
        change = (holder[name](seen[0]) - layer(seen[0])).flatten(1)
        if plan.activation_bits is None:
            assert torch.allclose(changes[:, number], change, atol=1e-5)
        else:  # the deployed layer also rounds the weight to eight bits, which matters little
            assert (changes[:, number] - change).norm() < 0.1 * change.norm()


def test_gptq_rounds_once_more_where_the_recipe_learns(measured: Any) -> None:
    net, traced, call, nearest = measured
    full = {name: candidates.plan for name, candidates in nearest.items()}
    learned = layer_candidates(CONFIG.model_copy(update={"recipe": LEARNED}), net, traced, full, [call])
    inputs: dict[nn.Module, Tensor] = {}
    with Hooks() as hooks:
        for layer in net.children():
            hooks.before(layer, lambda layer, x: inputs.update({layer: x[0]}))
        net(*call[0])
    for name, each in learned.items():
        if name == "grouped":  # GPTQ does not round it
            assert not each.gptq_bits
            assert each.count == nearest[name].count
            continue
        errors = each.output_changes(inputs[each.layer]).square().sum((0, 2))
        number = len(each.weight_bits) + len(each.grouped_bits)
        assert each.gptq_bits == (3,), "the measured number of bits that is closest to four"
        assert errors[number] < 0.8 * errors[0], name
        assert torch.equal(each.weight_changes[:number], nearest[name].weight_changes)
