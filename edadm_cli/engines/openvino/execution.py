"""Reads from the runtime graph of a compiled graph what really runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import openvino as ov

from edadm_cli.engines.base import FLOAT, MIXED, LayerExecution, OperationTime
from edadm_cli.engines.graph.description import PlannedLayer
from edadm_cli.engines.graph.tracing import WRAPPED

PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
NOT_RUN = "none"
"""The precision of a layer that is not in the runtime graph."""

_KINDS = {
    "Convolution": "conv2d",
    "FullyConnected": "linear",
    "MatMul": "attention",
    "ScaledDotProductAttention": "attention",
    "Softmax": "attention",
    "MVN": "norm",
    "FakeQuantize": "quantize",
    "Reorder": "reorder",
    "Transpose": "reorder",
    "Reshape": "reorder",
    "Concatenation": "reorder",
    "Split": "reorder",
    "StridedSlice": "reorder",
    "Convert": "reorder",
    "Interpolate": "resize",
}
_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention", "Subgraph")
# a Subgraph is a compiled chain of operations; it multiplies matrices only where it holds attention's products
_ATTENTION_SOURCES = ("MatMul", "ScaledDotProductAttention")
_NOTHING_TO_DO = ("Const", "Input", "Output")


class RuntimeNode:
    """Holds what is read from one node of a runtime graph."""

    def __init__(self, node: ov.Node) -> None:
        info = node.get_rt_info()
        self.type = _text(info, "layerType")
        self.precision = PRECISIONS.get(_text(info, "runtimePrecision").lower(), _text(info, "runtimePrecision"))
        self.name: str = node.friendly_name
        self.sources = tuple(filter(None, _text(info, "originalLayersNames").split(",")))
        micros = _text(info, "execTimeMcs")
        self.ran = micros.isdigit() and self.type not in _NOTHING_TO_DO  # "not_executed" where memory is only renamed
        self.milliseconds = int(micros) / 1000 if self.ran else 0.0
        order = _text(info, "execOrder")
        self.order = int(order) if order.isdigit() else 0

    @property
    def product_sources(self) -> list[str]:
        """Returns those sources of the node that are products; a fused chain also has other sources.

        A product that is not among the sources of its own node, as can be with fused operations, is the node's name.
        """
        if self.type != "Subgraph":
            return [*self.sources, self.name]
        return [source for source in self.sources if source.rpartition("/")[2].startswith(_ATTENTION_SOURCES)]


def runtime_nodes(compiled: ov.CompiledModel) -> list[RuntimeNode]:
    """Returns the nodes of a compiled graph in execution order, with the times of the last profiled call."""
    nodes = [RuntimeNode(node) for node in compiled.get_runtime_model().get_ordered_ops()]
    return sorted(nodes, key=lambda node: node.order)


def executed_layers(
    nodes: Iterable[RuntimeNode], planned: Iterable[PlannedLayer], reasons: Mapping[str, str], rest: str
) -> tuple[LayerExecution, ...]:
    """Returns how each planned layer runs.

    Args:
        nodes: The nodes of the runtime graph.
        planned: The layers in the order of the denoiser's modules.
        reasons: The name of each layer that is known not to run in integers, with the reason.
        rest: The element type of what is not quantized, such as `float32`.
    """
    products: dict[str, list[RuntimeNode]] = {}
    for node in nodes:
        if node.type in _PRODUCTS:
            for name in dict.fromkeys(map(layer_name, node.product_sources)):
                products.setdefault(name, []).append(node)
    return tuple(_execution(layer, products.get(layer.name, []), reasons.get(layer.name), rest) for layer in planned)


def _execution(layer: PlannedLayer, nodes: list[RuntimeNode], known: str | None, rest: str) -> LayerExecution:
    if layer.planned == FLOAT and nodes and nodes[0].precision == "int8":
        # the node states the element type of the weights, which it multiplies with an input in floating point
        return LayerExecution(layer.name, layer.kind, layer.planned, rest, None)
    floating = [node for node in nodes if node.precision != "int8"]
    precision, reason = "int8" if nodes else NOT_RUN, known
    if floating:
        reason = known or f"OpenVINO runs it as {floating[0].type} in {floating[0].precision}"
        precision = floating[0].precision if len(floating) == len(nodes) else MIXED
    elif not nodes:
        reason = known or "OpenVINO's runtime graph does not hold it"
    elif known is not None:
        precision = MIXED  # one node holds several products, and states the element type of one of them
    return LayerExecution(layer.name, layer.kind, layer.planned, precision, None if layer.planned == FLOAT else reason)


def operation_times(
    nodes: Iterable[RuntimeNode], planned: Iterable[PlannedLayer], reasons: Mapping[str, str], rest: str
) -> list[OperationTime]:
    """Returns the time of each node that ran; see `executed_layers` for the arguments."""
    names = {layer.name: layer.planned for layer in planned}
    rows = []
    for node in nodes:
        if not node.ran:
            continue
        # reorders inside an attention have its name too, but only its products count as the layer
        sources = node.product_sources if node.type in _PRODUCTS else []
        node_name = _without_wrapper(node.name)
        layer = next((name for name in map(layer_name, sources) if name in names), node_name)
        kind = "attention" if node.type == "Subgraph" and node.product_sources else _KINDS.get(node.type, "elementwise")
        precision = node.precision
        if precision == "int8" and names.get(layer) == FLOAT and node.type in _PRODUCTS:
            precision = rest  # int8 is the element type of its weights only
        elif precision == "int8" and node.type == "Subgraph" and kind == "attention" and layer in reasons:
            precision = MIXED
        rows.append(OperationTime(layer, kind, precision, node.milliseconds))
    return rows


def layer_name(source: str) -> str:
    """Returns the layer that a node comes from, whose name after tracing is `__module.denoiser.<layer>/aten::...`."""
    return _without_wrapper(source.partition("/")[0])


def _without_wrapper(name: str) -> str:
    return name.removeprefix(f"__module.{WRAPPED}.")


def _text(info: Any, key: str) -> str:
    return str(info[key].value) if key in info else ""
