"""Runs a denoiser's graph, which is compiled for each shape that it is called with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.graph.description import PlannedLayer
from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.engines.graph.tracing import sharing_copy
from edadm_cli.engines.openvino import condition, constant_inputs, forms, group_norm, saturation, sinusoids
from edadm_cli.engines.openvino.convert import convert
from edadm_cli.engines.openvino.execution import RuntimeNode, executed_layers, operation_times, runtime_nodes
from edadm_cli.engines.openvino.hidden_tokens import without_hidden_tokens
from edadm_cli.engines.openvino.int4 import widen
from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.denoiser_calls.call_templates import SAMPLE, TIMESTEP

# only two are kept, because each compiled graph holds all weights in the layout of its kernels
_SHAPES_KEPT = 2
_CONDITIONS_KEPT = 2  # those of the two branches of guidance
_GRAPHS_KEPT = 2  # such as those of the two branches of guidance, whose prompts differ in length
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

Shapes = tuple[tuple[int, ...], ...]


def plugin_properties(options: EngineOptions) -> dict[str, Any]:
    """Returns the properties of OpenVINO's CPU plug-in."""
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # by default the plug-in rounds every linear layer's floating-point input to eight bits, whatever the plan says
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": _PRECISIONS[options.rest_dtype],
    }
    if options.num_threads is not None:
        properties["INFERENCE_NUM_THREADS"] = options.num_threads
    return properties


@dataclass(eq=False)
class _Graph:
    """A graph with dynamic shapes, the calls that it fits, and the shapes that it turned out not to fit."""

    model: ov.Model
    interface: GraphInterface
    misfits: dict[Shapes, InputError] = field(default_factory=dict)


class OpenVinoDenoiser(CompiledDenoiser):
    """Runs a graph with dynamic shapes, and keeps the compiled graphs of the two shapes that were used last.

    A graph that fits only some calls is made again for others if the denoiser in torch is at hand; see `keep_source`.

    Args:
        graph: The graph, with int8 constants and inputs named as in `interface`.
        interface: It turns calls into inputs of the graph.
        planned: The layers as planned.
        options: The options of the engine.
        shapes: The shapes of the inputs for which the graph is compiled immediately.
        is_rewritten: Whether what runs faster in another form is rewritten, and hidden tokens are left out; if not,
            OpenVINO gets the graph and all inputs as they are.
    """

    def __init__(
        self,
        graph: ov.Model,
        interface: GraphInterface,
        planned: tuple[PlannedLayer, ...],
        options: EngineOptions,
        shapes: Shapes,
        *,
        is_rewritten: bool = True,
    ) -> None:
        self._graphs, self._planned, self._options = [_Graph(graph, interface)], planned, options
        self._is_rewritten = is_rewritten
        self._source: nn.Module | None = None
        self._core = ov.Core()
        self._requests: OrderedDict[tuple[_Graph, Shapes], _Compiled] = OrderedDict()
        self._request(self._graphs[0], shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser. The first call with another batch or image size compiles the graph for it."""
        graph, compiled, tensors = self._fitting(args, kwargs)
        return graph.interface.output(compiled.infer(tensors), args, kwargs)

    def keep_source(self, denoiser: nn.Module) -> None:
        """Keeps the tensors of a denoiser whose graph fits only some calls, to convert it for others."""
        if self._graphs[0].interface.is_specific:
            self._source = sharing_copy(denoiser)

    def _fitting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Graph, _Compiled, list[Tensor]]:
        """Returns the graph that fits a call, compiled for its shapes, and the inputs.

        Raises:
            InputError: No graph fits, and none can be made for the call.
        """
        refusal: InputError | None = None
        for graph in reversed(self._graphs):
            try:
                tensors = self._inputs(graph, args, kwargs)
                compiled = self._request(graph, _shapes(tensors))
            except InputError as error:
                refusal = refusal or error
                continue
            self._graphs.remove(graph)
            self._graphs.append(graph)  # the one that was used last is tried first
            return graph, compiled, tensors
        assert refusal is not None, "there is always a graph"
        if self._source is None:
            raise refusal
        return self._converted(self._source, args, kwargs, refusal)

    def _converted(
        self, source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], refusal: InputError
    ) -> tuple[_Graph, _Compiled, list[Tensor]]:
        """Makes a graph for a call that fits no other, and returns it compiled, with the inputs.

        Args:
            source: The denoiser in torch.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            refusal: Why an earlier graph does not fit.

        Raises:
            InputError: The denoiser cannot be called in this way, or OpenVINO cannot express what it then computes.
        """
        try:
            graph = _Graph(*convert(source, args, kwargs))
            widen(graph.model)
            tensors = self._inputs(graph, args, kwargs)
            compiled = self._request(graph, _shapes(tensors))
        except EdadmError as error:
            if error.message == refusal.message:  # the call itself is at fault
                raise refusal from error
            raise InputError(
                f"{refusal.message.removesuffix('.')}, and no other graph can be made: {error.message}", hint=error.hint
            ) from error
        self._graphs = [*self._graphs[1 - _GRAPHS_KEPT :], graph]
        return graph, compiled, tensors

    def _inputs(self, graph: _Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Returns the inputs of a graph for a call."""
        tensors = graph.interface.tensors(args, kwargs)
        if self._is_rewritten:
            tensors = without_hidden_tokens(graph.interface, tensors)
        return list(tensors.values())

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns how each layer runs, from the runtime graph of the shape that was used last."""
        compiled = next(reversed(self._requests.values()))
        return executed_layers(compiled.nodes, self._planned, compiled.in_float, self._rest)

    @property
    def _rest(self) -> str:
        """Returns the name of the element type of what is not quantized."""
        return str(self._options.rest_dtype).removeprefix("torch.")

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns the time of each operation of one call after a warm-up call, from a copy with counters.

        Layers that are computed once per condition do not run in such a call.
        """
        graph, _, tensors = self._fitting(args, kwargs)
        compiled = self._compile(graph, _shapes(tensors), {"PERF_COUNT": True})
        for _ in range(2):
            compiled.infer(tensors)
        return operation_times(runtime_nodes(compiled.model), self._planned, compiled.in_float, self._rest)

    def _request(self, graph: _Graph, shapes: Shapes) -> _Compiled:
        if shapes in graph.misfits:
            raise graph.misfits[shapes]
        key = (graph, shapes)
        if key not in self._requests:
            self._requests[key] = self._compile(graph, shapes, {})
            while len(self._requests) > _SHAPES_KEPT:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]

    def _compile(self, graph: _Graph, shapes: Shapes, more: dict[str, Any]) -> _Compiled:
        model, inputs = graph.model.clone(), graph.interface.inputs  # shares its constants
        saturating = saturation.replace_saturating_products(model, saturation.saturating_kinds())
        try:
            model.reshape(dict(zip(inputs, map(list, shapes), strict=True)))
            constant = dict.fromkeys(constant_inputs.compute_in_float(model), constant_inputs.REASON)
            in_float = dict.fromkeys(saturating, saturation.REASON) | constant
            once: ov.Model | None = None
            if self._is_rewritten:
                in_float |= forms.use_faster_forms(model, plugin_properties(self._options))
                group_norm.normalize_by_rows(model)
                once = condition.take_out(model, [inputs[place] for place in _steady_places(inputs)])
            compiled = _Compiled(self._core, model, self._options, more, in_float)
            if once is not None:
                head = _Compiled(self._core, once, self._options, more, in_float)
                compiled.once = _OncePerCondition(head, _steady_places(inputs))
            return compiled
        except RuntimeError as error:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in zip(inputs, shapes, strict=True))
            graph.misfits[shapes] = InputError(
                f"The OpenVINO graph of {graph.interface.denoiser} does not fit inputs of {sizes}:"
                f" {str(error).strip().splitlines()[-1]}"
            )
            raise graph.misfits[shapes] from error


class _Compiled:
    """Holds a graph that is compiled for one shape, and the graph of its sinusoids if the rest is not float32.

    Attributes:
        once: What was taken out of the graph to be computed once per condition.

    Args:
        core: OpenVINO's core object.
        graph: A graph with static shapes, which is changed: its sinusoids are taken out.
        options: The options of the engine.
        more: More properties of the plug-in.
        in_float: The reason for each layer that is not, or not entirely, in integers.

    Raises:
        RuntimeError: OpenVINO cannot compile the graph.
    """

    def __init__(
        self,
        core: ov.Core,
        graph: ov.Model,
        options: EngineOptions,
        more: dict[str, Any],
        in_float: dict[str, str],
    ) -> None:
        head = None if options.rest_dtype == torch.float32 else sinusoids.take_out(graph)
        self.in_float = in_float
        self.once: _OncePerCondition | None = None
        self.model = core.compile_model(graph, "CPU", plugin_properties(options) | more)
        self._request = self.model.create_infer_request()
        self._head: ov.InferRequest | None = None
        if head is not None:
            properties = plugin_properties(replace(options, rest_dtype=torch.float32))
            self._head = core.compile_model(head, "CPU", properties).create_infer_request()

    @property
    def nodes(self) -> list[RuntimeNode]:
        """Returns the nodes of the compiled graphs, first of those that run once per condition."""
        return ([] if self.once is None else self.once.compiled.nodes) + runtime_nodes(self.model)

    def infer(self, tensors: list[Tensor]) -> Tensor:
        """Returns a copy of the output for the graph's inputs."""
        # the request writes its next output to the same memory
        return torch.from_numpy(self.outputs([tensor.contiguous().numpy() for tensor in tensors])[0].copy())

    def outputs(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs, in memory that the next call writes to."""
        more = [] if self.once is None else self.once.values(inputs)
        if self._head is not None:
            self._head.infer(inputs + more, share_inputs=True)
            more = more + [output.data for output in self._head.output_tensors]
        self._request.infer(inputs + more, share_inputs=True)
        return [output.data for output in self._request.output_tensors]


class _OncePerCondition:
    """Computes what depends only on the condition, and keeps the values of the two conditions that were used last.

    Args:
        compiled: The compiled graph.
        steady: The places of the inputs that belong to the condition.
    """

    def __init__(self, compiled: _Compiled, steady: list[int]) -> None:
        self.compiled, self._steady = compiled, steady
        self._kept: list[tuple[list[np.ndarray], list[np.ndarray]]] = []

    def values(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the values for a call's inputs."""
        condition = [inputs[place] for place in self._steady]
        for index, (kept, values) in enumerate(self._kept):
            if all(map(np.array_equal, kept, condition)):
                self._kept.append(self._kept.pop(index))
                return values
        values = [output.copy() for output in self.compiled.outputs(inputs)]
        self._kept = [*self._kept[1 - _CONDITIONS_KEPT :], ([array.copy() for array in condition], values)]
        return values


def _steady_places(inputs: Iterable[str]) -> list[int]:
    """Returns the places of the inputs that belong to the condition, which is the same at every step."""
    return [place for place, name in enumerate(inputs) if name not in (SAMPLE, TIMESTEP)]


def shapes_of(interface: GraphInterface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """Returns the shapes of the inputs for a call, without hidden tokens."""
    return _shapes(without_hidden_tokens(interface, interface.tensors(args, kwargs)).values())


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)
