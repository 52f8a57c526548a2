"""An engine as another package would bring it: exact integers in torch, said to be eight-bit floating point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from edadm_cli.engines.base import FLOAT, CompiledDenoiser, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.quant.layers import QuantizedLayer


class ToyEngine(ReferenceEngine):
    """Runs on any device."""

    name = "toy"
    description = "an engine of another package"

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Compile as the reference does."""
        return _ToyDenoiser(super().compile(denoiser, args, kwargs, options))


class FailingEngine(ReferenceEngine):
    """Fails whenever it is asked for a layer or a denoiser."""

    name = "failing"
    description = "an engine with a defect"

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Raise an error that no command expects."""
        raise LookupError("no table of mine fits")

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Raise an error that no command expects."""
        raise LookupError("no row of mine fits")


class _ToyDenoiser(CompiledDenoiser):
    def __init__(self, inner: CompiledDenoiser) -> None:
        self._inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        rows = self._inner.layers
        return tuple(row if row.planned == FLOAT else replace(row, precision="float8_e4m3fn") for row in rows)

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        return self._inner.profile(*args, **kwargs)
