"""Decides by measurement in which form each large product runs on this processor.

The fastest form depends on the processor. With bfloat16 tiles (AMX), attention in bytes can take longer than in
bfloat16. Without them, bytes are faster. Every product that is large enough is therefore compiled alone in each form,
and the forms are timed in turns; those of attention with the projections before it, whose output its quantizers round.
Where the times of one form differ because the machine is busy, the processor time of this process decides, which other
programs hardly change.
The results are stored in a file per user, by processor, version of OpenVINO, element type, threads, shape and
attributes such as strides, so that a product is measured only once per processor.

Attention in floating point does not round its operands to their grids, so its output is nearer to that of full
precision than to that of the grids.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from edadm_cli.engines.openvino.movement import quantize_after_moving
from edadm_cli.engines.openvino.products import (
    QuantizedProduct,
    is_quantizer,
    quantized_products,
    quantizer_of_layer,
    source,
)

Form = Literal["bytes", "bytes quantized last", "scores in bytes", "float"]
"""How a product, or the two products of an attention, run:

- `bytes`: in bytes, with attention's quantizers before its transpositions, so that bytes are transposed;
- `bytes quantized last`: in bytes, with attention's quantizers after its transpositions;
- `scores in bytes`: the product of queries and keys in bytes, that of probabilities and values in floating point;
- `float`: in floating point.
"""
REASONS: dict[Form, str] = {
    "scores in bytes": "this processor was measured to run the product of probabilities and values faster in floating"
    " point",
    "float": "this processor was measured to run it faster in floating point",
}
"""Clauses that say why a product does not run in integers, for the forms in which one does not."""

LEAST_WORK = 100_000_000
"""The least multiply-accumulates of a product that is measured; smaller ones take less than about a millisecond."""

_LEAST_SHARE, _LEAST_ATTENTION = 0.05, 0.01
"""The least share of the work of all products that a shape must have to be measured, which takes about a second.

That of attention is smaller, because its faster form differs from shape to shape.
"""
_ROUNDS = 5
_STEADY = 1.25
"""How many times as long as the shortest call the median may take; else other programs take turns on the processor."""
_ADVANTAGES: dict[Form, float] = {"bytes quantized last": 0.97, "scores in bytes": 0.9, "float": 0.9}
"""A form is chosen if its shortest time is less than this share of the shortest time in the form `bytes`."""
_LARGEST_FILE = 1 << 20
_VERSION = 5
"""The version of what is stored. Versions 1 and 2 measured other operations than they name; in those up to 4, a busy
machine could make a slower form look faster."""
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")


@dataclass(frozen=True)
class _Operation:
    """Holds products whose form is decided together: that of one layer, or the two of an attention.

    Attributes:
        indices: The indices of its products in the order of `quantized_products`.
        layers: The names of the layers that the products belong to.
        shape: The kind, the sizes and the attributes. Operations of one shape have one form.
        work: The number of multiply-accumulates.
    """

    indices: tuple[int, ...]
    layers: tuple[str, ...]
    shape: str
    work: int

    @property
    def is_attention(self) -> bool:
        """Returns whether both operands of its products are activations."""
        return self.shape.startswith("attention")

    @property
    def candidates(self) -> tuple[Form, ...]:
        """Returns the forms in which it can run."""
        if not self.is_attention:
            return ("bytes", "float")
        forms: tuple[Form, ...] = get_args(Form)
        return forms if len(self.indices) == 2 else ("bytes", "bytes quantized last", "float")


def use_faster_forms(graph: ov.Model, properties: dict[str, Any]) -> dict[str, str]:
    """Converts the products that run faster in another form on this processor to that form, in place.

    Args:
        graph: A graph with static shapes and int8 constants.
        properties: The properties of OpenVINO's CPU plug-in with which the graph will be compiled.

    Returns:
        The reason for each layer that is not, or not entirely, in integers any more.
    """
    products = list(quantized_products(graph))
    operations = _operations(products)
    total = sum(operation.work for operation in operations)
    shapes: dict[str, list[_Operation]] = {}
    for operation in operations:
        shapes.setdefault(operation.shape, []).append(operation)
    memory = _Memory(properties)
    converted: list[tuple[_Operation, Form]] = []
    for shape, members in shapes.items():
        share = _LEAST_ATTENTION if members[0].is_attention else _LEAST_SHARE
        is_large = members[0].work >= LEAST_WORK and sum(each.work for each in members) >= share * total
        if not is_large:
            continue
        if shape not in memory.forms:
            try:
                memory.forms[shape] = _fastest_form(graph, members[0], properties)
            except RuntimeError:
                continue  # it cannot be compiled alone
            memory.write()
        converted += [(member, memory.forms[shape]) for member in members]
    # only now: a product in floating point is no longer counted by the indices with which the others are measured
    for operation, form in converted:
        _convert([products[index] for index in operation.indices], form)
    return {layer: REASONS[form] for operation, form in converted if form in REASONS for layer in operation.layers}


def _operations(products: list[QuantizedProduct]) -> list[_Operation]:
    """Returns the products of a graph as operations; the two products of an attention form one operation."""
    attention = {product.node.friendly_name: index for index, product in enumerate(products) if product.weight is None}
    followed: dict[int, int] = {}
    for index, product in enumerate(products):
        first = _scores(product.node, attention) if product.kind == "attention" else None
        if first is not None:
            followed[index] = first
    operations = []
    for index, product in enumerate(products):
        if index in followed.values():
            continue
        indices = (followed[index], index) if index in followed else (index,)
        members = [products[each] for each in indices]
        sizes = " ".join(_sizes(member.node) for member in members)
        layers = tuple(dict.fromkeys(member.layer for member in members))
        work = sum(_work(member.node) for member in members)
        operations.append(_Operation(indices, layers, f"{product.kind} {sizes}", work))
    return operations


def _scores(product: ov.Node, places: Mapping[str, int]) -> int | None:
    """Returns the index of the product whose softmax is a product's left operand; `None` if there is none.

    Between the two are a quantizer and what scales or masks the scores, so all operands are followed, nearest first.

    Args:
        product: The product of probabilities and values.
        places: The index of every product of two activations, by name.
    """
    waiting, seen, has_softmax = deque([product.input_value(0).get_node()]), set[str](), False
    while waiting:
        node = waiting.popleft()
        name, kind = node.get_friendly_name(), node.get_type_name()
        if name in places:
            return places[name] if has_softmax else None
        if kind in _PRODUCTS or name in seen:
            continue
        seen.add(name)
        has_softmax = has_softmax or kind == "Softmax"
        waiting.extend(value.get_node() for value in node.input_values())
    return None


def _sizes(product: ov.Node) -> str:
    """Returns the shapes of a product's operands, and its attributes: strides change its work, not its operands."""
    attributes = " ".join(f"{name}={value}" for name, value in sorted(product.get_attributes().items()))
    return f"{list(product.get_input_shape(0))}x{list(product.get_input_shape(1))} {attributes}"


def _work(product: ov.Node) -> int:
    outputs = int(np.prod(product.get_output_shape(0)))
    if product.get_type_name() == "MatMul":
        transposed = product.get_attributes()["transpose_a"]
        return outputs * int(product.get_input_shape(0)[-2 if transposed else -1])
    weight = product.get_input_shape(1)  # [outputs, inputs, height, width], with the groups before where there are any
    first = 2 if product.get_type_name() == "GroupConvolution" else 1
    return outputs * int(np.prod(weight[first:]))


def _convert(members: list[QuantizedProduct], form: Form) -> None:
    """Converts the products of an operation to a form, in place."""
    if form == "bytes quantized last":
        for quantizer in {node.get_name(): node for node in _quantizers(members)}.values():
            quantize_after_moving(quantizer)
    elif form == "scores in bytes":
        members[-1].use_fastest_float()
    elif form == "float":
        for member in members:
            member.use_fastest_float()


def _quantizers(members: list[QuantizedProduct]) -> list[ov.Node]:
    """Returns the quantizers of the inputs of an operation; attention's probabilities are not among its inputs."""
    operands = [(member, port) for member in members for port in (0, 1)]
    if len(members) == 2:
        operands.remove((members[1], 0))
    nodes = [source(member.node.input_value(port)) for member, port in operands]
    return [node for node in nodes if is_quantizer(node)]


def _fastest_form(graph: ov.Model, operation: _Operation, properties: dict[str, Any]) -> Form:
    runs = {form: _compiled(graph, operation, properties, form) for form in operation.candidates}
    elapsed: dict[Form, list[float]] = {form: [] for form in runs}
    used: dict[Form, list[float]] = {form: [] for form in runs}  # by all threads of this process
    for turn in range(_ROUNDS + 1):
        for form, (request, inputs) in runs.items():
            start, start_used = time.perf_counter(), time.process_time()
            request.infer(inputs, share_inputs=True)
            if turn:  # the first call allocates
                elapsed[form].append(time.perf_counter() - start)
                used[form].append(time.process_time() - start_used)
    is_steady = all(median(measured) <= _STEADY * min(measured) for measured in elapsed.values())
    shortest = {form: min(measured) for form, measured in (elapsed if is_steady else used).items()}
    faster = [
        form for form, share in _ADVANTAGES.items() if form in shortest and shortest[form] < share * shortest["bytes"]
    ]
    return min(faster, key=lambda form: shortest[form], default="bytes")


def _compiled(
    graph: ov.Model, operation: _Operation, properties: dict[str, Any], form: Form
) -> tuple[ov.InferRequest, list[np.ndarray]]:
    """Returns one operation of a graph, compiled alone with its quantizers, and random inputs for it.

    Attention is compiled with the layers before it. A mask is computed from ones.
    """
    products = list(quantized_products(graph.clone()))  # shares its constants
    members = [products[index] for index in operation.indices]
    generator = np.random.default_rng(0)
    parameters: dict[str, ov.op.Parameter] = {}
    inputs = []
    for quantizer in _quantizers(members):
        if operation.is_attention:
            quantizer = quantizer_of_layer(quantizer)
        if quantizer.get_name() in parameters:
            continue  # the input of several projections
        low, high = (float(quantizer.input_value(bound).get_node().data.min()) for bound in (1, 2))
        shape = list(quantizer.get_input_shape(0))
        parameter = ops.parameter(shape, ov.Type.f32)
        quantizer.input(0).replace_source_output(parameter.output(0))
        parameters[quantizer.get_name()] = parameter
        inputs.append(generator.uniform(low, high, shape).astype(np.float32))
    masks = _parameters_before(members[-1].node, {parameter.get_name() for parameter in parameters.values()})
    inputs += [np.ones(list(mask.shape), mask.get_element_type().to_dtype()) for mask in masks]
    model = ov.Model([members[-1].node], [*parameters.values(), *masks])
    _convert(members, form)
    return ov.Core().compile_model(model, "CPU", properties).create_infer_request(), inputs


def _parameters_before(node: ov.Node, seen: set[str]) -> list[ov.op.Parameter]:
    """Returns the inputs of a graph that a node depends on, without the nodes that `seen` names."""
    waiting, parameters = [node], []
    while waiting:
        current = waiting.pop()
        if current.get_name() in seen:
            continue
        seen.add(current.get_name())
        if current.get_type_name() == "Parameter":
            parameters.append(current)
        waiting.extend(value.get_node() for value in current.input_values())
    return parameters


class _Memory:
    """Stores what was measured on this processor, in a file of the user.

    A file that cannot be read or written is not an error, because the forms can be measured again.

    Args:
        properties: The properties of the plug-in, of which element type and threads are part of what is stored.
    """

    def __init__(self, properties: dict[str, Any]) -> None:
        facts = [
            f"version {_VERSION}",
            str(ov.Core().get_property("CPU", "FULL_DEVICE_NAME")),
            " ".join(sorted(ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))),
            ov.get_version(),
            *(f"{name}={value}" for name, value in sorted(properties.items())),
        ]
        self._key = "; ".join(facts)
        self.forms: dict[str, Form] = {
            shape: form for shape, form in self._read().get(self._key, {}).items() if form in get_args(Form)
        }

    def write(self) -> None:
        """Adds the new measurements to the file."""
        path, stored = _path(), self._read()
        if path is None:
            return
        stored[self._key] = self.forms
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(stored, indent=1), encoding="utf-8")
            partial.replace(path)
        except OSError:
            with suppress(OSError):  # the folder may be a file, or on a read-only disk
                partial.unlink()

    @staticmethod
    def _read() -> dict[str, dict[str, Any]]:
        path = _path()
        try:
            if path is None or not path.is_file() or path.stat().st_size > _LARGEST_FILE:
                return {}
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: value for key, value in stored.items() if isinstance(value, dict)}


def _path() -> Path | None:
    """Returns the file of the user; `None` for a user without a home."""
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(folder) / "edadm" / "openvino-forms.json"
