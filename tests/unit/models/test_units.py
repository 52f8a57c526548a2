"""The walk and the trace: every layer once, in execution order, in blocks, with the concatenations found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.models.units import Trace, trace, units

Call = tuple[tuple[Any, ...], dict[str, Any]]
STAGES = ("time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")


def _unet(folder: Path) -> tuple[nn.Module, Call]:
    from diffusers import UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    if folder.name == "tiny-sd":
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        return unet, ((torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.randn(2, 8, 16)), {})
    unet = UNet2DModel.from_pretrained(folder / "unet")
    return unet, ((torch.randn(2, 1, 8, 8), torch.tensor([5, 5])), {})


@pytest.fixture(params=["tiny_sd", "tiny_ddpm"])
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, Trace]:
    unet, (args, kwargs) = _unet(request.getfixturevalue(request.param))
    return unet, trace(unet, args, kwargs)


def test_every_layer_is_traced_once_from_input_to_output(traced: tuple[nn.Module, Trace]) -> None:
    unet, actual = traced
    walked = [name for name, module in unet.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(actual.names) == sorted(walked)
    assert actual.not_run == ()
    convolutions = [layer.name for layer in actual.layers if isinstance(layer.module, nn.Conv2d)]
    assert (convolutions[0], convolutions[-1]) == ("conv_in", "conv_out")
    assert actual.names[-1] == "conv_out"
    first = {stage: min(i for i, name in enumerate(actual.names) if name.startswith(stage)) for stage in STAGES}
    assert list(first.values()) == sorted(first.values()), "registration has up before mid, execution has not"


def test_the_time_embedding_is_known(traced: tuple[nn.Module, Trace]) -> None:
    _, actual = traced
    embedded = [layer.name for layer in actual.layers if layer.in_time_embedding]
    assert embedded == ["time_embedding.linear_1", "time_embedding.linear_2"]


def test_shortcuts_of_the_up_path_know_the_sizes_of_both_sources(traced: tuple[nn.Module, Trace]) -> None:
    unet, actual = traced
    split = {layer.name: layer.channel_parts for layer in actual.layers if layer.channel_parts is not None}
    shortcuts = [
        name
        for name, module in unet.named_modules()
        if name.startswith("up_blocks") and name.endswith("conv_shortcut") and isinstance(module, nn.Conv2d)
    ]
    assert sorted(split) == sorted(shortcuts)
    assert len(split) == 4
    # what comes from below, then the skip; the up path of (8, 16) channels with one layer per block
    assert [split[name] for name in actual.names if name in split] == [(16, 16), (16, 8), (16, 8), (8, 8)]
    for name, parts in split.items():
        assert parts is not None
        assert sum(parts) == unet.get_submodule(name).weight.shape[1]


def test_tracing_leaves_no_hook_behind(traced: tuple[nn.Module, Trace]) -> None:
    unet, _ = traced
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_units_cover_every_layer_exactly_once_in_execution_order(
    traced: tuple[nn.Module, Trace], granularity: Any
) -> None:
    unet, actual = traced
    result = units(unet, actual, set(actual.names), granularity)
    covered = [name for unit in result for name in unit.layers]
    assert sorted(covered) == sorted(actual.names)
    assert len(set(covered)) == len(covered)
    firsts = [actual.names.index(unit.layers[0]) for unit in result]
    assert firsts == sorted(firsts)
    for unit in result:
        positions = [actual.names.index(name) for name in unit.layers]
        assert positions == sorted(positions)
    if granularity == "layer":
        assert [unit.layers for unit in result] == [(name,) for name in actual.names]
        assert {unit.kind for unit in result} == {"layer"}


def test_blocks_of_a_text_to_image_denoiser(tiny_sd: Path) -> None:
    unet, (args, kwargs) = _unet(tiny_sd)
    actual = trace(unet, args, kwargs)
    by_name = {unit.name: unit for unit in units(unet, actual, set(actual.names), "block")}
    kinds = [unit.kind for unit in by_name.values()]
    # down: 1 + 1, mid: 2, up: 2 + 2 residual blocks; transformer blocks: 1 down, 1 mid, 2 up
    assert (kinds.count("residual"), kinds.count("transformer"), kinds.count("attention")) == (8, 4, 0)
    block = by_name["mid_block.attentions.0.transformer_blocks.0"]
    assert block.attentions == tuple(f"{block.name}.attn{index}" for index in (1, 2))
    assert block.layers[0] == f"{block.name}.attn1.to_q"
    assert block.layers[-1] == f"{block.name}.ff.net.2"
    assert by_name["mid_block.attentions.0.proj_in"].kind == "layer"
    residual = by_name["up_blocks.0.resnets.0"]
    layers = [name.removeprefix(residual.name + ".") for name in residual.layers]
    assert layers == ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]


def test_blocks_of_a_pixel_space_denoiser(tiny_ddpm: Path) -> None:
    unet, (args, kwargs) = _unet(tiny_ddpm)
    actual = trace(unet, args, kwargs)
    result = units(unet, actual, set(actual.names), "block")
    attention = [unit for unit in result if unit.kind == "attention"]
    assert [unit.name for unit in attention] == [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    for unit in attention:
        assert unit.attentions == (unit.name,)
        assert [name.rpartition(unit.name + ".")[2] for name in unit.layers] == ["to_q", "to_k", "to_v", "to_out.0"]


def test_layers_that_are_not_planned_are_in_no_unit(tiny_sd: Path) -> None:
    unet, (args, kwargs) = _unet(tiny_sd)
    actual = trace(unet, args, kwargs)
    planned = {name for name in actual.names if "attn2" not in name and name != "conv_in"}
    covered = {name for unit in units(unet, actual, planned, "block") for name in unit.layers}
    assert covered == planned


class _Odd(nn.Module):
    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.layer, self.unused, self.repeats = nn.Linear(4, 4), nn.Linear(4, 4), repeats

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            x = self.layer(x)
        return x


def test_a_layer_that_never_runs_is_named() -> None:
    assert trace(_Odd(1), (torch.zeros(1, 4),), {}).not_run == ("unused",)


def test_a_layer_that_runs_twice_is_named_and_not_reconstructed() -> None:
    actual = trace(_Odd(2), (torch.zeros(1, 4),), {})
    assert actual.repeated == ("layer",)
    assert actual.layers == []


def test_a_transformer_that_embeds_the_timestep_twice_can_be_split(tiny_dit: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(tiny_dit / "transformer")
    actual = trace(model, (torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.tensor([1])), {})
    prefix = "transformer_blocks.0.norm1.emb.timestep_embedder.linear"
    assert actual.repeated == (f"{prefix}_1", f"{prefix}_2")
    kinds = [unit.kind for unit in units(model, actual, set(actual.names), "block")]
    assert kinds == ["layer", "transformer", "transformer", "layer", "layer"]
