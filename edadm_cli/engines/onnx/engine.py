"""The engine ONNX Runtime, which runs a quantized denoiser from a standard ONNX file on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.base import (
    FLOAT,
    MIXED,
    CompiledDenoiser,
    EngineOptions,
    FileEngine,
    LayerExecution,
    OperationTime,
)
from edadm_cli.engines.graph.description import GraphDescription, PlannedLayer, load_description, planned_layers
from edadm_cli.errors import UsageError
from edadm_cli.quant.layers import QuantizedLayer

if TYPE_CHECKING:
    from edadm_cli.engines.onnx.session import Session

GRAPH_FILE = "denoiser.onnx"
FORMAT_VERSION = 2
"""The version of the files. Readers of version 1 do not know `$each` in a call; see `call_templates.Template`."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")

# Codes and sums are exact. What remains is the rounding of one product and one sum in float32, 2^-24 each.
LAYER_BOUND = 2.0**-22


class OnnxRuntimeEngine(FileEngine):
    """Runs a standard ONNX file with QuantizeLinear and DequantizeLinear in ONNX Runtime, with exact integer sums.

    Args:
        fixed_sizes: Whether a compiled denoiser takes only the sizes of its example call, and compiles faster.
    """

    name = "onnxruntime"
    description = "a standard ONNX file (QuantizeLinear / DequantizeLinear), run on the CPU; to take elsewhere"
    device_types = ("cpu",)
    layer_bound = LAYER_BOUND
    files_format = FORMAT_VERSION

    def __init__(self, fixed_sizes: bool = False) -> None:
        self._fixed_sizes = fixed_sizes

    def refusal(self, device: torch.device) -> str | None:
        """Returns a sentence for any device but a CPU, and for a missing package; `None` if the engine can run."""
        if device.type not in self.device_types:
            return (
                f"The engine '{self.name}' does not run on {device.type}: ONNX Runtime multiplies integers on CPUs"
                " only; the exported file runs in other providers, in floating point."
            )
        missing = [package for package in PACKAGES if find_spec(package) is None]
        if missing:
            return (
                f"The engine '{self.name}' needs {', '.join(missing)}, which this Python does not have:"
                " pip install 'edadm[onnx]'."
            )
        return None

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns a clause for a layer whose input is not quantized, or has a transform without channel factors."""
        quantizer = layer.input_quantizer
        return "its input is not quantized" if quantizer is None else quantizer.factors_refusal

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Writes the denoiser's file to a temporary folder and loads it; see `Engine.compile`."""
        with TemporaryDirectory(prefix="edadm-onnx-") as folder:
            self.save(denoiser, args, kwargs, options, Path(folder))
            return self.load(Path(folder), options)

    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Makes an ONNX Runtime session of one layer, and returns the function that runs it."""
        self._require(options)
        from edadm_cli.engines.onnx.export import layer_graph
        from edadm_cli.engines.onnx.integers import in_integers
        from edadm_cli.engines.onnx.session import make_session

        model = layer_graph(layer, x.dim())
        in_integers(model)
        session = make_session(model, options.num_threads)
        return lambda x: session.run({"x": x.float()}).to(x.device, x.dtype)

    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Writes `denoiser.onnx`, has `onnx.checker` check it, and writes `denoiser.json`."""
        self._require(options)
        from edadm_cli.engines.onnx.export import export_onnx

        folder.mkdir(parents=True, exist_ok=True)
        interface = export_onnx(denoiser, args, kwargs, folder / GRAPH_FILE, fixed_sizes=self._fixed_sizes)
        layers = planned_layers(denoiser)
        GraphDescription(format_version=FORMAT_VERSION, interface=interface, layers=layers).save(folder)

    def load(self, folder: Path, options: EngineOptions) -> CompiledDenoiser:
        """Loads a denoiser from the files that `save` wrote."""
        self._require(options)
        from edadm_cli.engines.onnx.session import load_session

        description = load_description(folder, GraphDescription, FORMAT_VERSION, self.name, (GRAPH_FILE,))
        return _OnnxDenoiser(description, load_session(folder / GRAPH_FILE, options.num_threads), options)

    def _require(self, options: EngineOptions) -> None:
        self.require(options.device)
        if options.rest_dtype != torch.float32:
            raise UsageError(
                f"The engine '{self.name}' computes what is not quantized in float32, not in"
                f" {str(options.rest_dtype).removeprefix('torch.')}."
            )


class _OnnxDenoiser(CompiledDenoiser):
    def __init__(self, description: GraphDescription, session: Session, options: EngineOptions) -> None:
        self._description, self._session, self._options = description, session, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interface = self._description.interface
        prediction = self._session.run(interface.tensors(args, kwargs))
        return interface.output(prediction, args, kwargs)

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        return tuple(self._execution(layer) for layer in self._description.layers)

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        from edadm_cli.engines.onnx.session import profile

        inputs = self._description.interface.tensors(args, kwargs)
        return profile(self._session, inputs, self._options.num_threads)

    def _execution(self, layer: PlannedLayer) -> LayerExecution:
        from edadm_cli.engines.onnx.export import product_name
        from edadm_cli.engines.onnx.session import INTEGER_PRODUCTS

        if layer.planned == FLOAT:
            return LayerExecution(layer.name, layer.kind, layer.planned, "float32")
        names = [layer.name]
        if layer.kind == "attention":
            names = [product_name(f"{layer.name}.{operand}") for operand in ("q", "p")]
        operators = {name: self._session.operator(name) for name in names}
        floating = {name: operator for name, operator in operators.items() if operator not in INTEGER_PRODUCTS}
        if not floating:
            return LayerExecution(layer.name, layer.kind, layer.planned, "int8")
        name, operator = next(iter(floating.items()))
        ran = f"runs it as {operator}" if operator else f"has no product '{name}' in its optimized graph"
        precision = "float32" if len(floating) == len(operators) else MIXED
        return LayerExecution(layer.name, layer.kind, layer.planned, precision, f"ONNX Runtime {ran}")
