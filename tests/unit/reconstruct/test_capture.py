"""Captured calls: in groups as one by one, complete, and stopped early; and the switch back to full precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.errors import InputError
from edadm_cli.quant.layers import quantized_layer
from edadm_cli.reconstruct.blocks import fill_layer
from edadm_cli.reconstruct.capture import UnitCalls, capture_units, flatten, unflatten
from edadm_cli.reconstruct.learn import channel_loss, layer_targets

MakeSetting = Callable[..., Any]
ROWS = 10  # five samples, two branches
RESIDUAL = "up_blocks.0.resnets.0"


def _equal(first: UnitCalls, second: UnitCalls) -> bool:
    pairs = zip([*first.tensors, *first.outputs], [*second.tensors, *second.outputs], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_group_captures_what_single_passes_capture(make_setting: MakeSetting) -> None:
    setting = make_setting()
    units = setting.units()
    together = capture_units(setting.denoiser, units, setting.batches, with_outputs=True)
    for unit, calls in list(zip(units, together, strict=True))[::4]:
        (alone,) = capture_units(setting.denoiser, [unit], setting.batches, with_outputs=True)
        assert _equal(calls, alone), unit.name
        assert calls.rows == ROWS


def test_captured_arguments_repeat_the_captured_output(make_setting: MakeSetting) -> None:
    setting = make_setting()
    units = setting.units()
    for unit, calls in zip(
        units, capture_units(setting.denoiser, units, setting.batches, with_outputs=True), strict=True
    ):
        args, kwargs = calls.call(calls.tensors)
        found: list[Tensor] = []
        with torch.no_grad():
            flatten(unit.module(*args, **kwargs), found, ROWS)
        for ours, theirs in zip(found, calls.outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_a_forward_ends_with_the_last_unit(make_setting: MakeSetting, with_outputs: bool) -> None:
    setting = make_setting()
    ran: list[str] = []
    for name in ("mid_block.resnets.0", "mid_block.resnets.1", "conv_out"):
        setting.denoiser.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    unit = setting.unit("mid_block.resnets.0")
    (calls,) = capture_units(setting.denoiser, [unit], setting.batches, with_outputs)
    assert set(ran) == ({unit.name} if with_outputs else set())
    assert bool(calls.outputs) == with_outputs


def test_layers_inside_a_unit_are_targets_in_execution_order(make_setting: MakeSetting) -> None:
    setting = make_setting()
    unit = setting.unit(RESIDUAL)
    (calls,) = capture_units(setting.denoiser, [unit], setting.batches, with_outputs=True)
    inner = unit.layers[:-1]
    targets = layer_targets(setting.network, unit, inner, calls, batch_size=5)
    assert list(targets) == [f"{RESIDUAL}.{name}" for name in ("conv1", "time_emb_proj", "conv2")]
    time = setting.denoiser.get_submodule(f"{RESIDUAL}.time_emb_proj")
    silu = nn.functional.silu(calls.tensors[1])
    torch.testing.assert_close(targets[f"{RESIDUAL}.time_emb_proj"], time(silu))
    # the last layers add up to the output: conv2 is a target, conv_shortcut is not
    shortcut = setting.denoiser.get_submodule(f"{RESIDUAL}.conv_shortcut")(calls.tensors[0])
    torch.testing.assert_close(targets[f"{RESIDUAL}.conv2"] + shortcut, calls.outputs[0], rtol=1e-4, atol=1e-5)


def test_the_loss_sums_over_channels_and_averages_over_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(3, 5, 2, 4, generator=generator) for _ in range(2))
    wanted = sum(
        float(((image - other)[n, :, y, x] ** 2).sum()) for n in range(3) for y in range(2) for x in range(4)
    ) / (3 * 2 * 4)
    assert float(channel_loss(image, other)) == pytest.approx(wanted)
    tokens, more = (torch.randn(3, 7, 5, generator=generator) for _ in range(2))
    wanted = sum(float(((tokens - more)[n, t] ** 2).sum()) for n in range(3) for t in range(7)) / (3 * 7)
    assert float(channel_loss(tokens, more)) == pytest.approx(wanted)


def test_a_tree_is_flattened_and_put_together_again() -> None:
    rows, fixed = torch.ones(4, 2), torch.ones(3)
    tree = ((rows, "text", [rows * 2, None]), {"a": {"b": rows * 3}, "ids": fixed, "flag": True})
    tensors: list[Tensor] = []
    structure = flatten(tree, tensors, 4)
    assert [float(t[0, 0]) for t in tensors] == [1, 2, 3]
    args, kwargs = unflatten(structure, iter([tensor * 10 for tensor in tensors]))
    assert float(args[0][0, 0]) == 10
    assert args[1] == "text"
    assert float(kwargs["a"]["b"][0, 0]) == 30
    assert kwargs["ids"] is fixed


@torch.no_grad()
def test_full_precision_comes_back_bit_for_bit(make_setting: MakeSetting) -> None:
    setting = make_setting("w3a5")
    (args, kwargs), *_ = iter(setting.batches)
    before, params = setting.denoiser(*args, **kwargs)[0], setting.nearest()
    for name in setting.plan.layers:
        layer = quantized_layer(setting.network.float_layers[name], setting.plan.layers[name])
        fill_layer(layer, name, params)
        setting.network.put_layer(name, layer)
    quantized = setting.denoiser(*args, **kwargs)[0]
    assert not torch.equal(quantized, before)
    with setting.network.full_precision():
        assert torch.equal(setting.denoiser(*args, **kwargs)[0], before)
    assert torch.equal(setting.denoiser(*args, **kwargs)[0], quantized)
    with pytest.raises(ZeroDivisionError), setting.network.full_precision():
        raise ZeroDivisionError
    assert torch.equal(setting.denoiser(*args, **kwargs)[0], quantized), "also after an error"


def test_ranges_are_found_for_every_quantizer(make_setting: MakeSetting) -> None:
    setting = make_setting()
    layers = [name for name, plan in setting.plan.layers.items() if plan.channel_parts is None]
    split = [name for name, plan in setting.plan.layers.items() if plan.channel_parts is not None]
    owners = layers + [f"{name}.part{index}" for name in split for index in (0, 1)]
    assert set(setting.ranges) == {
        f"{owner}.{key}" for owner in owners for key in ("weight_scale", "input_scale", "input_zero_point")
    }
    for name, tensor in setting.ranges.items():
        if name.endswith("scale"):
            assert tensor.dtype == torch.float32
            assert bool((tensor > 0).all())


@pytest.mark.parametrize("where", ["weight", "activation"])
def test_values_that_are_not_finite_are_refused_by_name(make_setting: MakeSetting, where: str) -> None:
    setting = make_setting()
    if where == "weight":
        setting.denoiser.conv_in.weight[0, 0, 0, 0] = float("nan")
        sentence = "the weight of 'conv_in'"
    else:
        setting.batches.calibration.sample[3, 0, 0, 0] = float("inf")
        sentence = "the input of 'conv_in'"
    with pytest.raises(InputError, match=sentence):
        search_ranges(setting.denoiser, setting.traced, setting.plan, setting.recipe.ranges, setting.batches)
