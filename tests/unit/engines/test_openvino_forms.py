"""Each kind of product takes the form that is faster on this processor, which is measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops
from torch import nn

from edadm_cli.engines.base import MIXED, EngineOptions
from edadm_cli.engines.graph.description import PlannedLayer
from edadm_cli.engines.openvino import forms, nodes
from edadm_cli.engines.openvino.denoiser import plugin_properties
from edadm_cli.engines.openvino.execution import executed_layers, operation_times, runtime_nodes
from edadm_cli.engines.openvino.products import quantized_products
from edadm_cli.quant.grid import activation_grid, weight_grid
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer
from edadm_cli.quant.plan import LayerPlan

PROPERTIES = plugin_properties(EngineOptions(torch.device("cpu"), num_threads=1))


@pytest.fixture(autouse=True)
def every_product_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products of any size are measured, and the memory is empty."""
    monkeypatch.setattr(forms, "LEAST_WORK", 0)
    monkeypatch.setattr(forms, "_LEAST_SHARE", 0.0)
    monkeypatch.setattr(forms, "_LEAST_ATTENTION", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def attention_graph(second_tokens: int = 0, *, is_quantized: bool = True) -> ov.Model:
    """A quantized linear layer and an attention, then another attention if it has tokens."""
    torch.manual_seed(0)
    layer = quantized_layer(nn.Linear(16, 16), LayerPlan(weight_bits=8, activation_bits=8))
    assert isinstance(layer, QuantizedLayer)
    codes = torch.randint(-128, 128, layer.weight_shape)
    layer.set_parameters(codes, torch.full((16,), 0.01), torch.tensor(0.02), torch.tensor(128, dtype=torch.int32))
    parameters = [ops.parameter([2, tokens, 16], ov.Type.f32) for tokens in (24, 24, second_tokens) if tokens]
    hidden = nodes.layer(parameters[0].output(0), layer, "projection")
    for context in parameters[1:]:
        hidden = attention(hidden, context.output(0), is_quantized=is_quantized)
    return ov.Model([hidden.get_node()], parameters)


def attention(queries: ov.Output, context: ov.Output, *, is_quantized: bool = True) -> ov.Output:
    """Attention; the context is both its keys and its values."""
    if not is_quantized:
        scores = ops.softmax(ops.matmul(queries, context, False, True), -1)
        return ops.matmul(scores, context, False, False).output(0)
    q, k, v = (
        nodes.fake_quantize(value, torch.tensor(0.02), None, weight_grid(8)) for value in (queries, context, context)
    )
    scores = ops.softmax(ops.matmul(q, k, False, True), -1)
    zero = torch.tensor(0, dtype=torch.int32)
    weights = nodes.fake_quantize(scores.output(0), torch.tensor(1 / 255), zero, activation_grid(8))
    return ops.matmul(weights, v, False, False).output(0)


def values(graph: ov.Model) -> np.ndarray:
    """What a graph computes of the same random numbers."""
    inputs = [np.random.default_rng(1).standard_normal((2, 24, 16)).astype(np.float32) for _ in range(2)]
    return np.array(ov.Core().compile_model(graph, "CPU", PROPERTIES)(inputs)[0])


def kinds(graph: ov.Model) -> list[str]:
    """The kinds of the products that are still quantized."""
    return [product.kind for product in quantized_products(graph)]


def test_the_faster_form_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def attention_is_slow(graph: ov.Model, operation: Any, properties: Any) -> forms.Form:
        measured.append(operation.shape.split()[0])
        return "float" if measured[-1] == "attention" else "bytes"

    monkeypatch.setattr(forms, "_fastest_form", attention_is_slow)
    graph, expected = attention_graph(), values(attention_graph(is_quantized=False))
    assert kinds(graph) == ["linear", "attention", "attention"]
    forms.use_faster_forms(graph, PROPERTIES)
    assert kinds(graph) == ["linear"]
    assert measured == ["linear", "attention"], "both products of an attention take one form"
    assert np.linalg.norm(values(graph) - expected) < 1e-5 * np.linalg.norm(expected), "nothing of it is rounded"
    again = attention_graph()
    forms.use_faster_forms(again, PROPERTIES)
    assert kinds(again) == ["linear"]
    assert len(measured) == 2, "what was measured is remembered"
    forms.use_faster_forms(attention_graph(), PROPERTIES | {"INFERENCE_NUM_THREADS": 2})
    assert len(measured) == 4, "another number of threads is measured anew"


def test_both_forms_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations are really compiled and run in both forms; only the clock is a counter."""
    graph = attention_graph()
    expected = kinds(graph)
    ticks = iter(range(10_000))
    monkeypatch.setattr(forms.time, "perf_counter", lambda: float(next(ticks)))
    assert forms.use_faster_forms(graph, PROPERTIES) == {}, "forms of equal times stay in bytes"
    assert kinds(graph) == expected


def test_a_product_in_floating_point_does_not_change_what_is_measured_next(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, list[list[int]]]] = []

    def float_is_faster(graph: ov.Model, operation: Any, properties: Any) -> forms.Form:
        for form in operation.candidates:
            _, inputs = forms._compiled(graph, operation, properties, form)
        measured.append((operation.shape, [list(each.shape) for each in inputs]))
        return "float"

    monkeypatch.setattr(forms, "_fastest_form", float_is_faster)
    graph = attention_graph(second_tokens=7)
    forms.use_faster_forms(graph, PROPERTIES)
    assert kinds(graph) == []
    assert len(measured) == 3
    assert all(str(shape) in name for name, shapes in measured for shape in shapes), measured


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ((100, 100, 100, 100), "bytes"),
        ((100, 96, 100, 100), "bytes quantized last"),
        ((100, 98, 91, 91), "bytes"),
        ((100, 90, 89, 95), "scores in bytes"),
        ((100, 96, 89, 80), "float"),
    ],
)
def test_the_form_with_the_shortest_time_is_chosen(
    monkeypatch: pytest.MonkeyPatch, milliseconds: tuple[int, ...], expected: str
) -> None:
    """A form that leaves operands in floating point has to be a tenth faster."""
    clock = [0.0]

    class Request:
        def __init__(self, taken: float) -> None:
            self.taken = taken

        def infer(self, *_: Any, **__: Any) -> None:
            clock[0] += self.taken

    graph = attention_graph()
    operation = forms._operations(list(quantized_products(graph)))[-1]
    assert operation.is_attention
    taken = dict(zip(operation.candidates, milliseconds, strict=True))
    monkeypatch.setattr(forms, "_compiled", lambda _graph, _operation, _properties, form: (Request(taken[form]), []))
    monkeypatch.setattr(forms.time, "perf_counter", lambda: clock[0])
    assert forms._fastest_form(graph, operation, PROPERTIES) == expected


def test_on_a_busy_machine_the_processor_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs interrupt all calls but one of the slowest form, so its shortest time is the shortest of all."""
    clocks = {"wall": 0.0, "processor": 0.0}

    class Request:
        def __init__(self, form: forms.Form) -> None:
            self.form, self.calls = form, 0

        def infer(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            taken = 2.0 if self.form == "float" else 1.0
            waited = 0.0 if self.form == "float" and self.calls == 3 else 3.0
            clocks["processor"] += taken
            clocks["wall"] += taken + waited

    graph = attention_graph()
    operation = forms._operations(list(quantized_products(graph)))[-1]
    monkeypatch.setattr(forms, "_compiled", lambda _graph, _operation, _properties, form: (Request(form), []))
    monkeypatch.setattr(forms.time, "perf_counter", lambda: clocks["wall"])
    monkeypatch.setattr(forms.time, "process_time", lambda: clocks["processor"])
    assert forms._fastest_form(graph, operation, PROPERTIES) == "bytes"


def test_a_damaged_memory_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "edadm" / "openvino-forms.json"
    path.parent.mkdir()
    path.write_text('{"a": [1', encoding="utf-8")
    forms.use_faster_forms(attention_graph(), PROPERTIES)
    assert '"attention' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("is_home_known", [True, False], ids=["a-file-in-the-way", "no-home"])
def test_a_place_that_cannot_be_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_home_known: bool
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(forms, "_fastest_form", lambda *_: "float")
    if is_home_known:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(forms.Path, "home", no_home)
    graph = attention_graph()
    forms.use_faster_forms(graph, PROPERTIES)
    assert kinds(graph) == []


@pytest.mark.parametrize("is_one_kernel", [True, False], ids=["one-kernel", "three-kernels"])
@pytest.mark.parametrize(
    ("form", "expected"), [("bytes", "int8"), ("scores in bytes", MIXED), ("float", "float32")], ids=str
)
def test_an_attention_has_one_precision_however_openvino_divides_it(
    form: forms.Form, expected: str, is_one_kernel: bool
) -> None:
    graph = attention_graph()
    if not is_one_kernel:  # the probabilities are read twice
        (softmax,) = [node for node in graph.get_ops() if node.get_type_name() == "Softmax"]
        graph.add_results([ops.result(softmax)])
    members = [product for product in quantized_products(graph) if product.kind == "attention"]
    for number, member in enumerate(members):
        member.node.friendly_name = f"attn/aten::matmul/MatMul_{number}"
    forms._convert(members, form)
    compiled = ov.Core().compile_model(graph, "CPU", PROPERTIES | {"PERF_COUNT": True})
    compiled([np.zeros((2, 24, 16), np.float32)] * 2)
    planned = [PlannedLayer(name="attn", kind="attention", planned="w8a8")]
    reasons = {"attn": forms.REASONS[form]} if form in forms.REASONS else {}
    executed = runtime_nodes(compiled)
    (layer,) = executed_layers(executed, planned, reasons, "float32")
    assert (layer.precision, layer.reason) == (expected, reasons.get("attn"))
    profiled = {row.precision for row in operation_times(executed, planned, reasons, "float32") if row.name == "attn"}
    assert profiled == ({"int8", "float32"} if expected == MIXED and not is_one_kernel else {expected})


def test_convolutions_of_other_strides_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def stride_is_slow(graph: ov.Model, operation: Any, properties: Any) -> forms.Form:
        measured.append(operation.shape)
        return "float" if "strides=[2, 2]" in operation.shape else "bytes"

    monkeypatch.setattr(forms, "_fastest_form", stride_is_slow)
    parameter, results = ops.parameter([1, 4, 8, 8], ov.Type.f32), []
    for stride in (1, 2):
        layer = quantized_layer(nn.Conv2d(4, 4, 3, stride, 1), LayerPlan(weight_bits=8, activation_bits=8))
        assert isinstance(layer, QuantizedLayer)
        codes = torch.randint(-128, 128, layer.weight_shape)
        layer.set_parameters(codes, torch.full((4,), 0.01), torch.tensor(0.02), torch.tensor(128, dtype=torch.int32))
        results.append(nodes.layer(parameter.output(0), layer, f"stride{stride}").get_node())
    in_float = forms.use_faster_forms(ov.Model(results, [parameter]), PROPERTIES)
    assert len(measured) == 2
    assert in_float == {"stride2": forms.REASONS["float"]}


def test_a_quantizer_of_both_operands_is_removed_once() -> None:
    parameter = ops.parameter([2, 8, 8], ov.Type.f32)
    doubled = ops.multiply(parameter, ops.constant(np.float32(2)))
    codes = nodes.fake_quantize(doubled.output(0), torch.tensor(0.02), None, weight_grid(8))
    graph = ov.Model([ops.matmul(codes, codes, False, True)], [parameter])
    (product,) = quantized_products(graph)
    product.use_fastest_float()
    x = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    expected = 4 * x @ x.transpose(0, 2, 1)
    assert np.allclose(ov.Core().compile_model(graph, "CPU", PROPERTIES)([x])[0], expected, atol=1e-4)
