"""What the diffusers quantizer refuses when a file's tensors fit in shape and type but not in meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.quantizers import auto
from safetensors.torch import save_file
from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.integrations.quantizer import METHOD, EdadmConfig, EdadmQuantizer
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer, quantized_layers
from edadm_cli.quant.network import quantize_network
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan, format_version
from edadm_cli.quant.storage import stored_bits, stored_bits_of_format_1


def _loaded(weight_bits: int, code: int) -> nn.Module:
    layer = quantized_layer(nn.Linear(4, 2), LayerPlan(weight_bits=weight_bits, activation_bits=8))
    assert isinstance(layer, QuantizedLayer)
    layer.weight_codes.fill_(code)
    return nn.Sequential(layer)


def _check(model: nn.Module) -> nn.Module:
    config = EdadmConfig(format_version=1, bits="w6a8", recipe="default", plan={"layers": {}})
    quantizer = EdadmQuantizer(config, pre_quantized=True)
    result: nn.Module = quantizer.postprocess_model(model)
    return result


@pytest.mark.parametrize("code", [-33, 32, 127])
def test_codes_that_six_bits_do_not_have_are_refused(code: int) -> None:
    with pytest.raises(InputError, match=r"'0.weight_int' has codes outside -32\.\.31"):
        _check(_loaded(6, code))


@pytest.mark.parametrize(("weight_bits", "codes"), [(3, 0x44), (2, 0x12), (3, 0x8B)])
def test_packed_codes_that_a_half_byte_has_and_the_grid_has_not_are_refused(weight_bits: int, codes: int) -> None:
    plan = LayerPlan(weight_bits=weight_bits, activation_bits=8)
    layer = quantized_layer(nn.Linear(4, 2), plan, stored_bits_of_format_1)
    assert isinstance(layer, QuantizedLayer)
    layer.weight_codes[1, 1] = codes
    with pytest.raises(InputError, match=r"'0.weight_int' has codes outside"):
        _check(nn.Sequential(layer))


@pytest.mark.parametrize(("weight_bits", "code"), [(6, -32), (6, 31), (8, -128), (8, 127)])
def test_codes_within_the_grid_pass(weight_bits: int, code: int) -> None:
    model = _loaded(weight_bits, code)
    assert _check(model) is model


def test_scales_that_are_not_positive_are_refused() -> None:
    model = _loaded(8, 1)
    model[0].weight_scale.copy_(torch.tensor([1.0, float("nan")]))  # type: ignore[operator,index,union-attr]
    with pytest.raises(InputError, match="not a positive number"):
        _check(model)


def test_diffusers_knows_the_method_as_a_string() -> None:
    config = EdadmConfig(format_version=1, bits="w4a8", recipe="default", plan={"layers": {}})
    assert auto.AUTO_QUANTIZER_MAPPING[config.quant_method] is EdadmQuantizer
    assert config.quant_method.value == METHOD


@pytest.mark.parametrize(("weight_bits", "version", "stored"), [(3, 2, 3), (2, 2, 2), (3, 1, 4), (4, 1, 4), (4, 2, 4)])
def test_both_formats_are_read_and_the_newer_one_is_written_where_it_is_smaller(
    tmp_path: Path, weight_bits: int, version: int, stored: int
) -> None:
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    plan = QuantizationPlan(layers={"conv_in": LayerPlan(weight_bits=weight_bits, activation_bits=8)})
    assert format_version(plan) == (2 if weight_bits < 4 else 1)
    quantize_network(unet, plan, stored_bits if version == 2 else stored_bits_of_format_1)
    codes = torch.randint(-2, 2, (8, 3, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    unet.conv_in.set_parameters(codes, torch.ones(8), torch.tensor(0.1), torch.tensor(7, dtype=torch.int32))
    assert unet.conv_in.weight_codes.shape == (8, -(-27 * stored // 8))
    settings = EdadmConfig(version, "w3a8", "default", plan.model_dump(mode="json")).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**unet.config, "quantization_config": settings}))
    save_file(unet.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(quantized_layers(loaded)["conv_in"].weight_int, codes)
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(quantized_layers(again)["conv_in"].weight_int, codes)


def test_an_export_with_groups_has_format_3_and_is_saved_again(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    plan = QuantizationPlan(layers={"conv_in": LayerPlan(weight_bits=4, activation_bits=8, group_size=16)})
    assert format_version(plan) == 3
    quantize_network(unet, plan)
    integers = torch.tensor([-8, 7, 3], dtype=torch.int8).repeat(8, 9).view(8, 3, 3, 3) * -5
    numbers = torch.tensor(0.1), torch.tensor(7, dtype=torch.int32)
    multipliers = torch.full((8, 2), -5, dtype=torch.int8)
    unet.conv_in.set_parameters(integers, torch.ones(8), *numbers, weight_multiplier=multipliers)
    settings = EdadmConfig(3, "w4g16a8", "default", plan.model_dump(mode="json", exclude_none=True)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**unet.config, "quantization_config": settings}))
    save_file(unet.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    UNet2DModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        layer = quantized_layers(UNet2DModel.from_pretrained(folder))["conv_in"]
        assert torch.equal(layer.weight_int, integers)
        assert torch.equal(layer.multipliers, multipliers)


def test_a_format_of_a_later_version_is_refused() -> None:
    with pytest.raises(InputError, match="has format 4; this version of edadm reads formats up to 3"):
        EdadmConfig(format_version=4, bits="w4a8", recipe="default", plan={"layers": {}}).quantization_plan()
