"""A denoiser's graph, compiled for each shape that it is called with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import openvino as ov
import torch
from torch import Tensor

from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.interface import GraphInterface
from edadm_cli.engines.openvino import saturation
from edadm_cli.engines.openvino.execution import PlannedLayer, executed_layers, operation_times, runtime_nodes
from edadm_cli.errors import InputError

# a graph compiled for one shape holds all weights in the layout of its kernels
_SHAPES_KEPT = 2
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

Shapes = tuple[tuple[int, ...], ...]


def plugin_properties(options: EngineOptions) -> dict[str, Any]:
    """Properties of OpenVINO's CPU plug-in."""
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _PRECISIONS[options.rest_dtype],
    }
    if options.num_threads is not None:
        properties["INFERENCE_NUM_THREADS"] = options.num_threads
    return properties


class OpenVinoDenoiser(CompiledDenoiser):
    """A graph with dynamic shapes and its compiled forms, the two used last.

    Args:
        graph: With int8 constants and inputs named as in `interface`.
        interface: How calls become inputs.
        planned: What the layers were planned as.
        options: Precision of the rest and threads.
        shapes: Of the inputs, to compile for at once.
    """

    def __init__(
        self,
        graph: ov.Model,
        interface: GraphInterface,
        planned: tuple[PlannedLayer, ...],
        options: EngineOptions,
        shapes: Shapes,
    ) -> None:
        self._graph, self._interface, self._planned, self._options = graph, interface, planned, options
        self._core = ov.Core()
        self._requests: OrderedDict[Shapes, ov.InferRequest] = OrderedDict()
        self._spared: frozenset[str] = frozenset()
        self._request(shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser; another batch or image size is compiled when it first comes."""
        tensors = self._tensors(args, kwargs)
        output = _infer(self._request(_shapes(tensors)), tensors)
        return self._interface.output(output, args, kwargs)

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        """How each layer runs, as the runtime graph of the shape used last says."""
        request = next(reversed(self._requests.values()))
        reasons = dict.fromkeys(self._spared, saturation.REASON)
        return executed_layers(runtime_nodes(request.get_compiled_model()), self._planned, reasons)

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Time of each operation of one call, from a copy compiled with counters; the first call warms up."""
        tensors = self._tensors(args, kwargs)
        request = self._compile(_shapes(tensors), {"PERF_COUNT": True})
        for _ in range(2):
            _infer(request, tensors)
        return operation_times(runtime_nodes(request.get_compiled_model()), self._planned)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return list(self._interface.tensors(args, kwargs).values())

    def _request(self, shapes: Shapes) -> ov.InferRequest:
        if shapes not in self._requests:
            self._requests[shapes] = self._compile(shapes, {})
            while len(self._requests) > _SHAPES_KEPT:
                self._requests.popitem(last=False)
        self._requests.move_to_end(shapes)
        return self._requests[shapes]

    def _compile(self, shapes: Shapes, more: dict[str, Any]) -> ov.InferRequest:
        graph = self._graph.clone()  # shares its constants
        self._spared = saturation.spare_products(graph, saturation.saturating_kinds())
        try:
            graph.reshape(dict(zip(self._interface.inputs, map(list, shapes), strict=True)))
            compiled = self._core.compile_model(graph, "CPU", plugin_properties(self._options) | more)
        except RuntimeError as error:
            sizes = ", ".join(
                f"{name} {list(shape)}" for name, shape in zip(self._interface.inputs, shapes, strict=True)
            )
            raise InputError(
                f"The OpenVINO graph of {self._interface.denoiser} does not fit inputs of {sizes}:"
                f" {str(error).strip().splitlines()[-1]}"
            ) from error
        return compiled.create_infer_request()


def shapes_of(interface: GraphInterface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Shapes of a call's inputs."""
    return _shapes(interface.tensors(args, kwargs).values())


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _infer(request: ov.InferRequest, tensors: list[Tensor]) -> Tensor:
    request.infer([tensor.contiguous().numpy() for tensor in tensors], share_inputs=True)
    # the request writes its next output to the same memory
    return torch.from_numpy(request.get_output_tensor(0).data.copy())
