"""What the diffusers quantizer refuses when a file's tensors fit in shape and type but not in meaning."""

from __future__ import annotations

import pytest
import torch
from diffusers.quantizers import auto
from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.integrations.quantizer import METHOD, EdadmConfig, EdadmQuantizer
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan


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
