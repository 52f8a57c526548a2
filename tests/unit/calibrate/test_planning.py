"""Which layer gets how many bits, by the recipe's fields and rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.planning import count, plan_network
from edadm_cli.config import BitWidth
from edadm_cli.errors import UsageError
from edadm_cli.models.units import Trace, trace
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import AttentionRecipe, LayerRule, RangeRecipe, Recipe

EDGES = {"time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out"}
W3A5 = BitWidth.parse("w3a5")
ALL_QUANTIZED = {"sample_float_input": False, "output_float_input": False}


@pytest.fixture
def traced(denoiser: nn.Module) -> Trace:
    args = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16))
    return trace(denoiser, args, {})


def _plan(traced: Trace, bits: str = "w3a5", **fields: Any) -> QuantizationPlan:
    return plan_network(traced, Recipe(name="test", **fields), BitWidth.parse(bits))


def test_every_layer_is_planned_or_kept_with_a_reason(traced: Trace) -> None:
    plan = _plan(traced, layers=(LayerRule(pattern="mid_block.*", exclude=True),))
    assert set(plan.layers) | set(plan.kept) == set(traced.names)
    assert not set(plan.layers) & set(plan.kept)
    assert set(plan.kept) == {name for name in traced.names if name.startswith("mid_block.")}
    assert all("'mid_block.*'" in reason for reason in plan.kept.values())


def test_the_edges_of_the_network_have_eight_bits(traced: Trace) -> None:
    plan = _plan(traced, **ALL_QUANTIZED)
    for name, layer in plan.layers.items():
        expected = (8, 8) if name in EDGES else (3, 5)
        assert (layer.weight_bits, layer.activation_bits) == expected, name


def test_edges_may_have_the_bits_of_all(traced: Trace) -> None:
    plan = _plan(traced, edge_weight_bits=None, edge_activation_bits=None, **ALL_QUANTIZED)
    assert {(layer.weight_bits, layer.activation_bits) for layer in plan.layers.values()} == {(3, 5)}


@pytest.mark.parametrize(("field", "layer"), [("sample_float_input", "conv_in"), ("output_float_input", "conv_out")])
def test_the_inputs_of_the_edges_may_stay_float(traced: Trace, field: str, layer: str) -> None:
    plan = _plan(traced, **ALL_QUANTIZED | {field: True})
    assert [name for name, planned in plan.layers.items() if planned.activation_bits is None] == [layer]
    assert plan.layers[layer].weight_bits == 8


def test_rules_raise_bits_and_the_last_match_wins(traced: Trace) -> None:
    rules = (
        LayerRule(pattern="*.to_q", weight_bits=6, activation_bits=7),
        LayerRule(pattern="mid_block.*.to_q", weight_bits=7),
        LayerRule(pattern="*.to_k", float_input=True),
        LayerRule(pattern="conv_in", weight_bits=5),
    )
    plan = _plan(traced, layers=rules)

    def bits(name: str) -> tuple[int, int | None]:
        return plan.layers[name].weight_bits, plan.layers[name].activation_bits

    block = "attentions.0.transformer_blocks.0.attn1"
    assert bits(f"down_blocks.0.{block}.to_q") == (6, 7)
    assert bits(f"mid_block.{block}.to_q") == (7, 5), "rules are not merged"
    assert bits(f"mid_block.{block}.to_k") == (3, None)
    assert bits(f"mid_block.{block}.to_v") == (3, 5)
    assert bits("conv_in") == (5, None)


def test_a_pattern_that_matches_nothing_is_a_usage_error(traced: Trace) -> None:
    with pytest.raises(UsageError, match=r"'up_block\.\*' of the recipe 'test' matches none") as caught:
        _plan(traced, layers=(LayerRule(pattern="conv_*"), LayerRule(pattern="up_block.*", exclude=True)))
    assert caught.value.exit_code == 2


def test_a_recipe_that_leaves_nothing_to_quantize_is_a_usage_error(traced: Trace) -> None:
    with pytest.raises(UsageError, match="leaves no layer"):
        _plan(traced, layers=(LayerRule(pattern="*", exclude=True),))


def test_shortcuts_are_split_when_the_recipe_says_so(traced: Trace) -> None:
    split, whole = (_plan(traced, ranges=RangeRecipe(channel_parts=on)) for on in (True, False))
    parts = [layer.channel_parts for layer in split.layers.values() if layer.channel_parts]
    assert parts == [(16, 16), (16, 8), (16, 8), (8, 8)]
    assert not any(layer.channel_parts for layer in whole.layers.values())


def test_attention_is_planned_when_the_recipe_says_so(traced: Trace) -> None:
    assert _plan(traced).attentions == {}
    plan = _plan(traced, attention=AttentionRecipe(quantize=True, probability_bits=7))
    assert list(plan.attentions) == list(traced.attentions)
    assert {(a.activation_bits, a.probability_bits) for a in plan.attentions.values()} == {(5, 7)}
    assert count(plan, traced)["attention_products"] == 2 * 8


def test_layers_are_counted_by_kind(traced: Trace) -> None:
    actual = count(_plan(traced), traced)
    convolutions = sum(isinstance(layer.module, nn.Conv2d) for layer in traced.layers)
    assert actual == {
        "conv2d": convolutions,
        "linear": len(traced.layers) - convolutions,
        "attention_products": 0,
    }


def test_a_processor_that_is_not_plain_keeps_its_products_and_says_so(denoiser: nn.Module, traced: Trace) -> None:
    class SomeProcessor:
        pass

    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    denoiser.get_submodule(name).processor = SomeProcessor()  # type: ignore[assignment]
    plan = _plan(traced, attention=AttentionRecipe(quantize=True))
    assert name not in plan.attentions
    assert "SomeProcessor" in plan.kept[name]


def test_a_layer_that_cannot_be_quantized_is_kept_with_the_reason(denoiser: nn.Module, traced: Trace) -> None:
    denoiser.conv_in.padding_mode = "circular"  # type: ignore[union-attr]
    plan = _plan(traced)
    assert "zero-padded" in plan.kept["conv_in"]


class _Grouped(nn.Module):
    """A grouped convolution over a concatenation: channel ranges and groups cut the weight differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.grouped(torch.cat([y, y], dim=1))


def test_a_grouped_convolution_is_not_split() -> None:
    actual = trace(_Grouped(), (torch.zeros(1, 2, 4, 4),), {})
    plan = plan_network(actual, Recipe(name="test"), W3A5)
    assert plan.layers["grouped"].channel_parts is None


def test_a_transformers_ends_are_its_patches_and_its_last_linear_layer(tiny_dit: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(tiny_dit / "transformer")
    actual = trace(model, (torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.tensor([1])), {})
    plan = _plan(actual, sample_float_input=False)
    eight = {name for name, layer in plan.layers.items() if layer.weight_bits == 8}
    assert {"pos_embed.proj", "proj_out_2"} <= eight
    assert plan.layers["proj_out_2"].activation_bits is None
    assert plan.layers["pos_embed.proj"].activation_bits == 8
    embedded_again = {name for name, reason in plan.kept.items() if "more than once" in reason}
    assert embedded_again == set(actual.repeated) != set()
