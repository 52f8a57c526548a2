"""A denoiser whose weights are rounded by GPTQ, beside one whose weights are rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.quant.network import load_quant_params, quantize_network
from tests.unit.reconstruct.conftest import Setting

MakeSetting = Callable[..., Setting]


def test_the_prediction_is_closer_than_with_nearest_rounding(make_setting: MakeSetting) -> None:
    setting = make_setting("w3a8")
    calls, denoiser = list(setting.batches), setting.denoiser
    with torch.no_grad():
        expected = [denoiser(*args, **kwargs)[0] for args, kwargs in calls]
    nearest = setting.nearest()
    rounded = gptq_params(denoiser, setting.traced, setting.plan, setting.ranges, setting.batches)
    assert rounded.keys() == nearest.keys()
    quantize_network(denoiser, setting.plan)

    def error(params: dict[str, Tensor]) -> float:
        load_quant_params(denoiser, params)
        with torch.no_grad():
            outputs = [denoiser(*args, **kwargs)[0] for args, kwargs in calls]
        return sum(float((y - x).square().sum()) for x, y in zip(expected, outputs, strict=True))

    assert error(rounded) < 0.8 * error(nearest)
