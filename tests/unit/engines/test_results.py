"""An engine of another package that returns something else than its interface says is named, with its package."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.parity import compare_layers
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.engines.results import compile_denoiser, require_like, require_prediction, require_rows
from edadm_cli.errors import MachineError
from edadm_cli.quant.layers import QuantizedLayer
from tests.unit.engines.conftest import Call

OPTIONS = EngineOptions(torch.device("cpu"))
COMPILED: Any = SimpleNamespace()


class WrongEngine(ReferenceEngine):
    """Returns the denoiser as it is, and layers that drop a row."""

    name = "wrong"

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Returns no compiled denoiser."""
        return denoiser  # type: ignore[return-value]

    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Returns a function whose results have another shape."""
        run = super().compile_layer(layer, x, options)
        return lambda x: run(x)[1:]


def test_an_engine_that_compiles_to_something_else(quantized: nn.Module, call: Call) -> None:
    expected = r"The engine 'wrong' of the package tests returned .*, where a CompiledDenoiser .* is expected"
    with pytest.raises(MachineError, match=expected):
        compile_denoiser(WrongEngine(), quantized, *call, OPTIONS)


def test_an_engine_whose_layers_return_another_shape(quantized: nn.Module, call: Call) -> None:
    with pytest.raises(MachineError, match=r"The engine 'wrong' .* a tensor with shape \(.*\) for the layer '"):
        compare_layers(WrongEngine(), quantized, *call, OPTIONS)


def test_an_engine_that_predicts_something_else() -> None:
    exact = torch.zeros(2, 4)
    assert require_like(WrongEngine(), "the prediction", exact, exact) is exact
    for result in (None, torch.zeros(2, 3)):
        with pytest.raises(MachineError, match=r"'wrong' .* a tensor with shape \(2, 4\) for the prediction"):
            require_like(WrongEngine(), "the prediction", result, exact)


@pytest.mark.parametrize("output", [None, (), (None,), {"sample": 3}, ([torch.zeros(1), None],)])
def test_a_denoiser_that_returns_no_prediction(output: Any) -> None:
    with pytest.raises(MachineError, match=r"A denoiser of the package types returned"):
        require_prediction(COMPILED, output)


def test_what_denoisers_of_diffusers_return_is_a_prediction() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    x = torch.zeros(1, 2)
    for output in (x, (x,), ([x, x],), Transformer2DModelOutput(sample=x)):
        assert require_prediction(COMPILED, output) is output


def test_a_denoiser_whose_layers_are_no_rows() -> None:
    row = LayerExecution("a", "linear", "w8a8", "int8")
    assert require_rows(COMPILED, "layers", (row,), LayerExecution) == [row]
    for rows in (None, ["int8"], iter([row])):
        with pytest.raises(MachineError, match=r"'layers' of a denoiser .* a list of 'LayerExecution' is expected"):
            require_rows(COMPILED, "layers", rows, LayerExecution)


class HalfDenoiser(CompiledDenoiser):
    """Predicts fewer columns than the denoiser."""

    def __init__(self, denoiser: nn.Module, divisor: int) -> None:
        self.denoiser, self.divisor = copy.deepcopy(denoiser), divisor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sample = self.denoiser(*args, **kwargs)[0]
        return (sample[..., : sample.shape[-1] // self.divisor],)

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        return ()

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        return []


def test_a_prediction_of_another_shape_names_the_package_in_a_pipeline(quantized: nn.Module, call: Call) -> None:
    args, kwargs = call
    expected = tuple(quantized(*args, **kwargs)[0].shape)
    narrow, whole = (EngineDenoiser(copy.deepcopy(quantized), HalfDenoiser(quantized, each)) for each in (2, 1))
    assert whole(*args, **kwargs)[0].shape == expected
    message = rf"A denoiser of the package tests returned .*, where a prediction with shape {re.escape(str(expected))}"
    with pytest.raises(MachineError, match=message):
        narrow(*args, **kwargs)
