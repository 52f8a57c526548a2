"""Families: what a denoiser is known for, and what is read off a denoiser that nobody described."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import cast

import diffusers
import pytest
import torch
from torch import Tensor, nn

from edadm_cli import plugins
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.errors import InputError, MachineError
from edadm_cli.models.families import DenoiserFamily, block_kinds, families, family_of, middle_module, registry
from edadm_cli.models.units import trace, units
from edadm_cli.recipe import load_recipe


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


class _Unheard(nn.Module):
    """A denoiser of no family, whose blocks are in a list with an uncommon name, after a convolution of clips."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(2, 8, 1)
        self.parts = nn.ModuleList(_Block() for _ in range(3))
        self.pair = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))  # no blocks: one layer each
        self.out = nn.Linear(8, 2)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.patches(hidden_states).flatten(2).transpose(1, 2)
        for module in (*self.parts, *self.pair):
            x = module(x)
        out: Tensor = self.out(x)
        return out


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = list(registry._registered)
    yield
    registry._registered[:] = before


CALL = ((torch.zeros(1, 2, 1, 2, 2), torch.tensor(1)), {})


def test_an_undescribed_denoiser_has_the_blocks_of_its_repeated_lists() -> None:
    denoiser = _Unheard()
    traced = trace(denoiser, *CALL)
    assert block_kinds(denoiser) == {"_Block": "transformer"}
    blocks = [unit.name for unit in units(denoiser, traced, set(traced.names), "block") if unit.kind != "layer"]
    assert blocks == ["parts.0", "parts.1", "parts.2"]
    assert middle_module(denoiser) is denoiser.parts[1]


def test_a_layer_of_a_type_that_is_not_quantized_is_left_in_float_by_name() -> None:
    traced = trace(_Unheard(), *CALL)
    plan = plan_network(traced, load_recipe("default"), BitWidth.parse("w4a8"))
    assert plan.kept["patches"] == "layers of type Conv3d are not quantized"
    assert set(plan.layers) | set(plan.kept) == {"patches", "out", *(n for n in traced.names)}


def test_diffusers_own_blocks_come_before_lists() -> None:
    denoiser = _Unheard()
    denoiser._repeated_blocks = ["Linear", "NotThere"]  # type: ignore[assignment]
    assert set(block_kinds(denoiser)) == {"Linear"}


def test_a_registered_family_decides_and_subclasses_belong_to_it(clean_registry: None) -> None:
    class Derived(_Unheard):
        pass

    assert family_of(Derived()).name == "undescribed"
    registry.register(DenoiserFamily("unheard", ("_Unheard",), blocks={"Linear": "attention"}, block_lists=("pair",)))
    denoiser = Derived()
    assert family_of(denoiser).name == "unheard"
    assert middle_module(denoiser) is denoiser.pair[1]
    assert dict(block_kinds(denoiser)) == {"Linear": "attention"}


def test_a_tuple_of_one_name_without_its_comma_is_refused() -> None:
    """Else every class whose name is part of the text would belong to the family."""
    with pytest.raises(TypeError, match=r"'denoisers' of the family 'toy' is the text 'ToyTransformer'"):
        DenoiserFamily("toy", denoisers=("ToyTransformer"))  # type: ignore[arg-type]


def test_without_blocks_there_is_no_middle_and_the_sentence_says_what_to_do() -> None:
    with pytest.raises(InputError, match="neither a mid-block nor a list of blocks") as caught:
        middle_module(nn.Sequential(nn.Linear(2, 2)))
    assert "Describe a denoiser" in str(caught.value.hint)


def test_every_class_that_a_family_names_exists() -> None:
    defined_here = {"ClassConditionalUNet"}
    names = {name for family in families() for name in family.denoisers} - defined_here
    assert [name for name in sorted(names) if not hasattr(diffusers, name)] == []


def test_a_denoiser_on_an_engine_has_the_family_of_the_one_it_stands_for() -> None:
    denoiser = diffusers.DreamLiteUNetModel.__new__(diffusers.DreamLiteUNetModel)
    nn.Module.__init__(denoiser)
    denoiser.weight = nn.Parameter(torch.zeros(1))
    expected = family_of(denoiser)
    assert expected.one_prompt_pipelines == ("DreamLitePipeline",)
    assert family_of(EngineDenoiser(denoiser, cast(CompiledDenoiser, lambda *_: None))) is expected


def test_two_packages_with_a_family_of_one_class_are_both_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, names in (("one_family", '"Shared", "Mine"'), ("other_family", '"Shared"')):
        text = "from edadm_cli.models.families import DenoiserFamily\n"
        (tmp_path / f"{module}.py").write_text(f"{text}FAMILY = DenoiserFamily('{module}', denoisers=({names},))\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("toy", f"{module}:FAMILY", registry.GROUP) for module in ("one_family", "other_family")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == registry.GROUP else [])
    cached = (registry._points, registry._from_packages)
    try:
        for each in cached:
            each.cache_clear()
        with pytest.raises(MachineError, match=r"describe the class Shared: one_family \(.*\) and other_family \("):
            family_of(nn.Linear(1, 1))
        points.pop()
        for each in cached:
            each.cache_clear()
        assert families()[0].denoisers == ("Shared", "Mine")
    finally:
        monkeypatch.undo()
        for each in cached:
            each.cache_clear()
