"""The reference engine: exact integers, whatever the order of summation, and a report of every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.engines.parity import compare_layers, relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

CPU = EngineOptions(device=torch.device("cpu"))
Call = tuple[tuple[Any, ...], dict[str, Any]]


def test_a_compiled_denoiser_is_called_like_the_denoiser(quantized: nn.Module, call: Call) -> None:
    args, kwargs = call
    compiled = ReferenceEngine().compile(quantized, args, kwargs, CPU)
    expected = quantized(*args, **kwargs).sample
    actual = compiled(*args, **kwargs)
    assert type(actual) is type(quantized(*args, **kwargs))
    assert torch.equal(actual.sample, compiled(*args, **kwargs, return_dict=False)[0])
    assert 0 < relative_l2(actual.sample, expected) < 0.05, "codes at the edge of rounding may differ"
    assert all(layer.arithmetic == "fake-quantize" for layer in quantized_layers(quantized).values())


def test_every_layer_is_listed_in_order(quantized: nn.Module, call: Call) -> None:
    rows = ReferenceEngine().compile(quantized, *call, CPU).layers
    assert [row.name for row in rows if row.kind != "attention"] == list(quantized_layers(quantized))
    attention = [row for row in rows if row.kind == "attention"]
    assert attention
    assert all(row.precision == "float32" and row.reason and not row.is_met for row in attention)
    assert {(row.planned, row.precision) for row in rows if row.kind != "attention"} == {
        ("w8a8", "int8"),
        ("w4a8", "int8"),
    }


def test_the_profile_holds_every_layer_and_the_rest(quantized: nn.Module, call: Call) -> None:
    rows = ReferenceEngine().compile(quantized, *call, CPU).profile(*call[0], **call[1])
    assert {row.name for row in rows} == {*quantized_layers(quantized), "all else"}
    assert all(row.milliseconds > 0 for row in rows)


def test_the_reference_has_parity_with_itself(quantized: nn.Module, call: Call) -> None:
    parity = compare_layers(ReferenceEngine(), quantized, *call, CPU)
    assert parity.errors == dict.fromkeys(quantized_layers(quantized), 0.0)
    exact = ReferenceEngine().compile(quantized, *call, CPU)(*call[0], **call[1]).sample
    assert torch.equal(parity.prediction, exact)


def test_a_layer_that_is_off_is_named(quantized: nn.Module, call: Call) -> None:
    wrong = "mid_block.resnets.0.conv1"

    class Skewed(ReferenceEngine):
        def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Any:
            run = super().compile_layer(layer, x, options)
            is_wrong = layer is quantized.get_submodule(wrong)
            return lambda x: run(x) * 1.001 if is_wrong else run(x)

    name, error = compare_layers(Skewed(), quantized, *call, CPU).worst
    assert name == wrong
    assert error == pytest.approx(1e-3, rel=1e-3)


def test_an_error_that_is_no_number_is_the_worst(quantized: nn.Module, call: Call) -> None:
    wrong = "mid_block.resnets.0.conv1"

    class Broken(ReferenceEngine):
        def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Any:
            run = super().compile_layer(layer, x, options)
            return lambda x: run(x) * (float("nan") if layer is quantized.get_submodule(wrong) else 2.0)

    name, error = compare_layers(Broken(), quantized, *call, CPU).worst
    assert name == wrong
    assert error != error


def test_a_large_network_is_checked_by_signature(quantized: nn.Module, call: Call) -> None:
    every = compare_layers(ReferenceEngine(), quantized, *call, CPU)
    few = compare_layers(ReferenceEngine(), quantized, *call, CPU, all_layers_up_to=10)
    assert few.num_layers == every.num_layers == len(every.errors) > len(few.errors) > 10
    shapes = {layer.weight_shape for layer in quantized_layers(quantized).values()}
    assert {quantized.get_submodule(name).weight_shape for name in few.errors} == shapes


def test_a_layer_that_an_engine_refuses_is_not_compared(quantized: nn.Module, call: Call) -> None:
    class Choosy(ReferenceEngine):
        def layer_refusal(self, layer: QuantizedLayer) -> str | None:
            return "not today" if layer is quantized.get_submodule("conv_out") else None

    parity = compare_layers(Choosy(), quantized, *call, CPU)
    assert parity.refused == {"conv_out": "not today"}
    assert "conv_out" not in parity.errors


def test_the_reference_is_an_engine_without_a_gpu() -> None:
    engine: Engine = ReferenceEngine()
    assert engine.refusal(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(engine.refusal(torch.device("cuda")))
