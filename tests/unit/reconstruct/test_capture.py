"""Captured calls: in groups as one by one, complete, and stopped early; and the switch back to full precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.errors import InputError, MachineError
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.units import Unit
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer, quantized_layers
from edadm_cli.quant.network import fill_layer
from edadm_cli.recipe import Recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.blocks import BlockReconstruction, Workspace, freeze_unit
from edadm_cli.reconstruct.call_signatures import flatten, probe_units, unflatten
from edadm_cli.reconstruct.capture import UnitCalls, capture_units
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints
from edadm_cli.reconstruct.finished import FinishedUnits, Link, find_links
from edadm_cli.reconstruct.rows import RowCache, Rows
from edadm_cli.reconstruct.unit_data import channel_loss, layer_targets

MakeSetting = Callable[..., Any]
ROWS = 10  # five samples, two branches
RESIDUAL = "up_blocks.0.resnets.0"


def all_rows(rows: Rows) -> Tensor:
    return rows.read(range(rows.count))


def _tensors(calls: UnitCalls) -> list[Tensor]:
    return [rows.read(range(rows.count)) for rows in (*calls.tensors, *calls.outputs)]


def _equal(first: UnitCalls, second: UnitCalls) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(second), strict=True))


def test_a_group_captures_what_single_passes_capture(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting()
    units = setting.units()
    together = setting.capture(units, setting.cache(tmp_path))
    for unit, calls in list(zip(units, together, strict=True))[::4]:
        (alone,) = setting.capture([unit], setting.cache(tmp_path))
        assert _equal(calls, alone), unit.name
        assert calls.rows == ROWS


def test_a_pass_onto_the_disk_captures_the_same_bytes(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting()
    units = setting.units()
    in_memory = setting.capture(units, setting.cache(tmp_path / "memory"))
    cache = setting.cache(tmp_path / "disk", budget=10_000)
    on_disk = setting.capture(units, cache)
    kinds = {rows.in_memory for calls in on_disk for rows in (*calls.tensors, *calls.outputs)}
    assert kinds == {True, False}, "the budget holds some of it"
    assert 0 < cache.used <= 10_000
    assert all(_equal(a, b) for a, b in zip(in_memory, on_disk, strict=True))
    cache.release(rows for calls in on_disk for rows in (*calls.tensors, *calls.outputs))
    assert cache.used == 0
    assert list((tmp_path / "disk").rglob("*.rows")) == []


def test_a_batch_that_does_not_fit_is_halved(
    make_setting: MakeSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make_setting()
    units = setting.units()[::5]
    whole = setting.capture(units, setting.cache(tmp_path))
    forward = setting.denoiser.forward
    sizes: list[int] = []

    def scarce(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("no")
        return forward(sample, *args, **kwargs)

    forms = probe_units(setting.denoiser, units, setting.batches)
    monkeypatch.setattr(setting.denoiser, "forward", scarce)
    halved = capture_units(setting.denoiser, units, forms, setting.batches, setting.cache(tmp_path), with_outputs=True)
    assert sizes == [6, 2, 4, 2, 2, 4, 2, 2]
    for first, second in zip(whole, halved, strict=True):
        for ours, theirs in zip(_tensors(first), _tensors(second), strict=True):
            torch.testing.assert_close(ours, theirs)
    monkeypatch.setattr(setting.denoiser, "forward", lambda *_, **__: scarce(torch.zeros(3)))
    with pytest.raises(MachineError, match="does not suffice for the denoiser's forward of one sample"):
        capture_units(setting.denoiser, units, forms, setting.batches, setting.cache(tmp_path), with_outputs=True)


def test_captured_arguments_repeat_the_captured_output(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting()
    units = setting.units()
    for unit, calls in zip(units, setting.capture(units, setting.cache(tmp_path)), strict=True):
        args, kwargs = calls.call([all_rows(rows) for rows in calls.tensors])
        with torch.no_grad():
            actual = calls.outputs_of(unit.module(*args, **kwargs))
        for ours, theirs in zip(actual, calls.outputs, strict=True):
            torch.testing.assert_close(ours, all_rows(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_outputs", [False, True])
def test_a_forward_ends_with_the_last_unit(make_setting: MakeSetting, tmp_path: Path, with_outputs: bool) -> None:
    setting = make_setting()
    unit = setting.unit("mid_block.resnets.0")
    forms = probe_units(setting.denoiser, [unit], setting.batches)
    ran: list[str] = []
    for name in ("mid_block.resnets.0", "mid_block.resnets.1", "conv_out"):
        setting.denoiser.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    cache = setting.cache(tmp_path)
    (calls,) = capture_units(setting.denoiser, [unit], forms, setting.batches, cache, with_outputs=with_outputs)
    assert set(ran) == ({unit.name} if with_outputs else set())
    assert bool(calls.outputs) == with_outputs


def test_layers_inside_a_unit_are_targets_in_execution_order(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting()
    unit = setting.unit(RESIDUAL)
    cache = setting.cache(tmp_path)
    (calls,) = setting.capture([unit], cache)
    rows = layer_targets(setting.network, unit, calls, 5, cache)
    targets = {name: all_rows(target) for name, target in rows.items()}
    assert list(targets) == [f"{RESIDUAL}.{name}" for name in ("conv1", "time_emb_proj", "conv2")]
    time = setting.denoiser.get_submodule(f"{RESIDUAL}.time_emb_proj")
    x, embedding = (all_rows(tensor) for tensor in calls.tensors)
    torch.testing.assert_close(targets[f"{RESIDUAL}.time_emb_proj"], time(nn.functional.silu(embedding)))
    # the last layers add up to the output: conv2 is a target, conv_shortcut is not
    shortcut = setting.denoiser.get_submodule(f"{RESIDUAL}.conv_shortcut")(x)
    expected = all_rows(calls.outputs[0])
    torch.testing.assert_close(targets[f"{RESIDUAL}.conv2"] + shortcut, expected, rtol=1e-4, atol=1e-5)


class _Blend(nn.Module):
    """Adds position ids to its input: a constant whose first dimension may be any size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale(x) + ids.sum(), ids


class _Positions(nn.Module):
    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.grows, self.block = grows, _Blend()

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        ids = torch.arange(float(ROWS) if not self.grows else 2.0 * len(sample) + 1)[:, None]
        out: Tensor = self.block(sample.flatten(1)[:, :4], ids)[0]
        return out


def test_a_constant_as_long_as_there_are_rows_is_no_row_tensor(calibration: CalibrationSet, tmp_path: Path) -> None:
    batches = Batches(calibration, 5, torch.device("cpu"))  # one forward of all ten rows
    model = _Positions(grows=False)
    unit = Unit("block", "layer", model.block, ("block.scale",))
    forms = probe_units(model, [unit], batches)
    assert forms["block"].input_mask == (True, False)
    assert forms["block"].output_mask == (True, False)
    cache = RowCache(tmp_path, 2**20, torch.device("cpu"))
    (calls,) = capture_units(model, [unit], forms, batches, cache, with_outputs=True)
    args, _ = calls.call([torch.zeros(2, 4)])
    assert len(args[1]) == ROWS


def test_a_tensor_that_grows_in_another_way_is_refused(calibration: CalibrationSet) -> None:
    model = _Positions(grows=True)
    unit = Unit("block", "layer", model.block, ("block.scale",))
    with pytest.raises(InputError, match="A tensor of 'block' has shape"):
        probe_units(model, [unit], Batches(calibration, 5, torch.device("cpu")))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_rows_are_numbered_batch_by_batch_with_the_branches_inside(
    calibration: CalibrationSet, batch_size: int
) -> None:
    batches = Batches(calibration, batch_size, torch.device("cpu"))
    numbers = [row for indices in batches.indices() for row in batches.rows(indices)]
    assert numbers == list(range(ROWS))
    first = batches.indices()[0]
    assert sorted(batches.rows(first[:1]) + batches.rows(first[1:])) == batches.rows(first)


def test_the_loss_sums_over_channels_and_averages_over_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(3, 5, 2, 4, generator=generator) for _ in range(2))
    expected = sum(
        float(((image - other)[n, :, y, x] ** 2).sum()) for n in range(3) for y in range(2) for x in range(4)
    ) / (3 * 2 * 4)
    assert float(channel_loss(image, other)) == pytest.approx(expected)
    tokens, more = (torch.randn(3, 7, 5, generator=generator) for _ in range(2))
    expected = sum(float(((tokens - more)[n, t] ** 2).sum()) for n in range(3) for t in range(7)) / (3 * 7)
    assert float(channel_loss(tokens, more)) == pytest.approx(expected)


def test_a_tree_is_flattened_and_put_together_again() -> None:
    rows, fixed = torch.ones(4, 2), torch.ones(3)
    tree = ((rows, "text", [rows * 2, None]), {"a": {"b": rows * 3}, "ids": fixed, "flag": True})
    tensors: list[Tensor] = []
    structure = flatten(tree, tensors, iter([True, True, True, False]))
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
    setting = make_setting(recipe=Recipe(name="all", sample_float_input=False, output_float_input=False))
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
    setting = make_setting(recipe=Recipe(name="edges too", sample_float_input=False))
    if where == "weight":
        setting.denoiser.conv_in.weight[0, 0, 0, 0] = float("nan")
        sentence = "the weight of 'conv_in'"
    else:
        setting.batches.calibration.sample[3, 0, 0, 0] = float("inf")
        sentence = "the input of 'conv_in'"
    with pytest.raises(InputError, match=sentence):
        search_ranges(setting.denoiser, setting.traced, setting.plan, setting.recipe.ranges, setting.batches)


class _Frames(nn.Module):
    """Works on the frames of a clip, those of one clip after the other or those of one moment."""

    def __init__(self, by_clip: bool) -> None:
        super().__init__()
        self.by_clip, self.block = by_clip, _Blend()

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        frames = torch.stack([sample.flatten(1)[:, :4], 2 * sample.flatten(1)[:, :4]], dim=1 if self.by_clip else 0)
        out: Tensor = self.block(frames.flatten(0, 1), torch.zeros(1, 1))[0]
        return out


def test_frames_of_a_clip_are_one_row(calibration: CalibrationSet, tmp_path: Path) -> None:
    batches = Batches(calibration, 3, torch.device("cpu"))
    model = _Frames(by_clip=True)
    unit = Unit("block", "layer", model.block, ("block.scale",))
    forms = probe_units(model, [unit], batches)
    assert [(kind.shape, kind.entries) for kind in forms["block"].inputs] == [((2, 4), 2)]
    cache = RowCache(tmp_path, 2**20, torch.device("cpu"))
    (calls,) = capture_units(model, [unit], forms, batches, cache, with_outputs=True)
    rows = calls.tensors[0].read([0, calls.rows - 1])
    assert torch.equal(rows[:, 1], 2 * rows[:, 0])
    args, _ = calls.call([calls.tensors[0].kind.joined(rows)])
    assert args[0].shape == (4, 4)


def test_frames_of_one_moment_are_no_rows(calibration: CalibrationSet) -> None:
    model = _Frames(by_clip=False)
    unit = Unit("block", "layer", model.block, ("block.scale",))
    with pytest.raises(InputError, match="A tensor of 'block' has shape") as caught:
        probe_units(model, [unit], Batches(calibration, 5, torch.device("cpu")))
    assert "exclude = true" in str(caught.value.hint)


@pytest.mark.parametrize("budget", [2**28, 1])
def test_passes_with_stubs_capture_what_passes_from_the_start_capture(
    make_setting: MakeSetting, tmp_path: Path, budget: int
) -> None:
    """The units are frozen one after another; the next inputs are the same bytes, and no unit runs more than twice."""
    setting = make_setting()
    denoiser, units, nearest = setting.denoiser, setting.units(), setting.nearest()
    forms = probe_units(denoiser, units, setting.batches)
    links = find_links(denoiser, units, forms, setting.batches)
    assert links.keys() == {unit.name for unit in units}
    skips = [name for name, link in links.items() if len(link.readers) > 1]
    assert skips, "outputs of the way down go to the way up as well"
    cache = setting.cache(tmp_path, budget)
    finished = FinishedUnits(denoiser, units, links, forms, cache, setting.batches.num_rows)
    for unit in units:
        plain, stubbed = (
            capture_units(denoiser, [unit], forms, setting.batches, cache, with_outputs=False, finished=stubs)[0]
            for stubs in (None, finished)
        )
        for first, second in zip(plain.tensors, stubbed.tensors, strict=True):
            assert torch.equal(all_rows(first), all_rows(second)), unit.name
        cache.release([*plain.tensors, *stubbed.tensors])
        freeze_unit(setting.network, setting.plan, unit, nearest)
        finished.add(unit)
    finished.close()
    assert not list(tmp_path.rglob("*.rows"))
    assert not any("forward" in vars(module) for module in denoiser.modules())
    setting.restore()


def test_a_unit_that_can_be_no_stub_keeps_only_what_it_reads(make_setting: MakeSetting, tmp_path: Path) -> None:
    """It runs in every pass, which captures the same bytes, and its inputs count as stored until the end."""
    setting = make_setting()
    denoiser, units, nearest = setting.denoiser, setting.units(), setting.nearest()
    forms = probe_units(denoiser, units, setting.batches)
    able = {name: form for name, form in forms.items() if name != units[4].name}
    links = find_links(denoiser, units, able, setting.batches)
    kept = {name for name, link in links.items() if 4 in link.readers}
    assert kept
    cache = setting.cache(tmp_path, 2**28)
    finished = FinishedUnits(denoiser, units, links, forms, cache, setting.batches.num_rows)
    for place, unit in enumerate(units):
        plain, stubbed = (
            capture_units(denoiser, [unit], forms, setting.batches, cache, with_outputs=False, finished=stubs)[0]
            for stubs in (None, finished)
        )
        for first, second in zip(plain.tensors, stubbed.tensors, strict=True):
            assert torch.equal(all_rows(first), all_rows(second)), unit.name
        cache.release([*plain.tensors, *stubbed.tensors])
        assert cache.used <= finished._stored[place], "the plan counts what is stored"
        freeze_unit(setting.network, setting.plan, unit, nearest)
        finished.add(unit)
    assert {name for name, rows in finished._finished.items() if rows} >= kept
    last = len(units) - 1
    for name, rows in finished._finished.items():
        assert not rows or name in kept or max(links[name].readers) >= last - 1, f"{name} is read no more"
    finished.close()
    assert cache.used == 0
    setting.restore()


def test_a_unit_that_is_finished_runs_in_one_more_pass(make_setting: MakeSetting, tmp_path: Path) -> None:
    setting = make_setting(iterations=0)
    units = setting.units()
    reconstruction = BlockReconstruction(
        setting.network,
        setting.plan,
        setting.nearest(),
        setting.batches,
        setting.hyperparameters,
        seed=0,
        workspace=Workspace(setting.cache(tmp_path), UnitCheckpoints(tmp_path)),
    )
    runs = []
    original = QuantizedLayer.forward

    def counted(layer: QuantizedLayer, x: Tensor) -> Tensor:
        runs.append(layer)
        return original(layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLayer, "forward", counted)
        reconstruction.run(units, lambda _: None)
    layers = quantized_layers(setting.denoiser)
    batches = len(setting.batches)
    counts = {name: sum(run is layer for run in runs) for name, layer in layers.items()}
    assert set(counts.values()) <= {0, batches}, "not once per unit that comes after"


@pytest.mark.parametrize("mixes_inputs", [True, False])
def test_stored_outputs_leave_each_unit_the_memory_that_it_learns_in(
    make_setting: MakeSetting, tmp_path: Path, mixes_inputs: bool
) -> None:
    """With less memory, outputs that live long go to files first, and none of a unit that needs little."""
    setting = make_setting(iterations=1)
    units, rows = setting.units(), setting.batches.num_rows
    forms = probe_units(setting.denoiser, units, setting.batches)
    links = find_links(setting.denoiser, units, forms, setting.batches)
    places = {unit.name: place for place, unit in enumerate(units)}
    sizes = {name: rows * sum(kind.bytes for kind in link.form.outputs) for name, link in links.items()}
    lives = {name: range(places[name] + 1, max(link.readers, default=-1) + 2) for name, link in links.items()}
    needs = [
        rows
        * (form.call_bytes + form.learning_bytes(True) - (0 if mixes_inputs else sum(k.bytes for k in form.inputs)))
        for form in (forms[unit.name] for unit in units)
    ]

    def stored(names: Collection[str]) -> list[int]:
        return [sum(sizes[name] for name in names if place in lives[name]) for place in range(len(units))]

    def planned(budget: int, links: Mapping[str, Link] = links) -> FinishedUnits:
        return FinishedUnits(setting.denoiser, units, links, forms, setting.cache(tmp_path, budget), rows, mixes_inputs)

    everything = {name for name, life in lives.items() if life}
    most = max(need + size for need, size in zip(needs, stored(everything), strict=True))
    assert most < max(needs) + max(stored(everything)), "the unit that needs most is not where most is stored"
    assert planned(most).expected_bytes() == max(stored(everything))
    tight = planned(most - 1)
    in_memory = {name for name in everything if name in tight._planned}
    assert in_memory < everything
    assert all(need + size < most for need, size in zip(needs, stored(in_memory), strict=True))
    assert tight.expected_bytes([units[3].name]) == stored(in_memory)[3]
    in_files = everything - in_memory
    assert min(len(lives[name]) for name in in_files) > min(len(lives[name]) for name in in_memory)
    assert planned(min(needs) - 1).expected_bytes() == 0
    largest = needs.index(max(needs))
    others = {name: link for name, link in links.items() if name != units[largest].name}
    unlinked = planned(needs[largest], others)
    assert unlinked.expected_bytes([units[largest].name]) == 0, "a unit that can be no stub learns too"
    assert unlinked.expected_bytes() > 0
