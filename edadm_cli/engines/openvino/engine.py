"""The engine OpenVINO, which runs quantized denoisers on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, FileEngine
from edadm_cli.engines.graph.description import planned_layers
from edadm_cli.engines.openvino import files, nodes, saturation
from edadm_cli.engines.openvino.convert import convert
from edadm_cli.engines.openvino.denoiser import OpenVinoDenoiser, plugin_properties, shapes_of
from edadm_cli.engines.openvino.hidden_tokens import shortened_prompts
from edadm_cli.engines.openvino.int4 import widen
from edadm_cli.errors import MachineError
from edadm_cli.quant.layers import QuantizedLayer

# OpenVINO rounds x / scale + zero_point where the reference rounds x / scale and adds then. Near 255 the sum loses up
# to 2^-17, so about one code in 100,000 goes to the other side of a tie, by one: at eight bits about 1 % of the typical
# code, so sqrt(1e-5) * 1e-2 = 3e-5 of a large layer, and 1e-3 of one with a thousand elements in which it happens once.
LAYER_BOUND = 2e-3

_CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}


class OpenVinoEngine(FileEngine):
    """Runs convolutions, linear layers and attention in INT8 with OpenVINO, and the rest in float32 or bfloat16."""

    name = "openvino"
    description = "OpenVINO on the CPU: INT8 convolutions and products, the rest in float32 or bfloat16"
    device_types = ("cpu",)
    layer_bound = LAYER_BOUND
    files_format = files.FORMAT_VERSION

    def refusal(self, device: torch.device) -> str | None:
        """Returns a sentence for any device but a CPU; OpenVINO's CPU plug-in runs wherever it is installed."""
        return None if device.type == "cpu" else f"The engine openvino runs on the cpu only, not on {device.type}."

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns a clause for a layer whose input is not quantized, which has no integers to multiply.

        A layer whose sums this processor cannot compute exactly is not refused. It runs in floating point and is
        compared with exact integers like all others, and a compiled denoiser's `layers` say so.
        """
        quantizer = layer.input_quantizer
        return "its input stays in floating point" if quantizer is None else quantizer.factors_refusal

    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Converts and compiles a denoiser; see `Engine.compile`."""
        self._require(options)
        graph, interface = convert(denoiser, args, kwargs)
        widen(graph)
        shapes = shapes_of(interface, args, kwargs)
        compiled = OpenVinoDenoiser(graph, interface, planned_layers(denoiser), options, shapes)
        compiled.keep_source(denoiser)
        return compiled

    def computed_call(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call without hidden tokens; see `Engine.computed_call`."""
        return args, kwargs | shortened_prompts(type(denoiser).__name__, kwargs)

    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Compiles a graph of one layer."""
        self._require(options)
        parameter = ops.parameter(list(x.shape), ov.Type.f32)
        graph = ov.Model([nodes.layer(parameter.output(0), layer, "layer")], [parameter])
        widen(graph)
        saturation.replace_saturating_products(graph, saturation.saturating_kinds())
        request = ov.Core().compile_model(graph, "CPU", plugin_properties(options)).create_infer_request()

        def run(given: Tensor) -> Tensor:
            request.infer([given.detach().float().contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data.copy()).to(given.dtype)

        return run

    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Writes the graph. The options have no effect, because `load` sets precision and threads."""
        graph, interface = convert(denoiser, args, kwargs)
        description = files.Description(
            openvino=ov.get_version(),
            interface=interface,
            shapes=shapes_of(interface, args, kwargs),
            layers=planned_layers(denoiser),
        )
        files.write(graph, description, folder)

    def load(self, folder: Path, options: EngineOptions) -> CompiledDenoiser:
        """Loads the graph and compiles it for the shapes of the example call; see `FileEngine.load`."""
        self._require(options)
        graph, description = files.read(folder)
        widen(graph)
        return OpenVinoDenoiser(graph, description.interface, description.layers, options, description.shapes)

    def _require(self, options: EngineOptions) -> None:
        self.require(options.device)
        capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES.get(options.rest_dtype) not in capabilities:
            asked = str(options.rest_dtype).removeprefix("torch.")
            raise MachineError(
                f"OpenVINO does not compute in {asked} on this CPU; it offers {', '.join(capabilities)}.",
                hint="--dtype float32",
            )
