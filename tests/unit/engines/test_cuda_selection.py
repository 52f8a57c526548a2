"""Layers that float16 runs faster: chosen by measured times, listed with the reason, and near to what they replace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from edadm_cli.engines.base import EngineOptions, LayerExecution
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda import engine as engine_module
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.cuda.fused_blocks.assembly import Assembly
from edadm_cli.engines.cuda.fused_blocks.attention import FusedAttention
from edadm_cli.engines.cuda.products.layout import rows_of
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.norms import Normalization
from edadm_cli.engines.cuda.products.product import FloatProduct
from edadm_cli.engines.cuda.selection import Use, _recorded, faster_in_float
from edadm_cli.engines.cuda.times import MeasuredTimes, ProductTime, SourceTime, measured_times, table
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.quant.operation import Operation

Call = tuple[tuple[Any, ...], dict[str, Any]]
CPU = EngineOptions(device=torch.device("cpu"))
GPU = "a GPU of tests"


def uses_of(denoiser: nn.Module, call: Call) -> dict[str, list[Use]]:
    meta = EngineOptions(torch.device("meta"), torch.float16)
    assembly = Assembly(Lowering(meta.device, torch.float16), prompt_cache=True)
    model, layers = assembly.build(denoiser)
    compiled = CudaDenoiser(model, layers, assembly.state, meta, cuda_graphs=False)
    compiled(*call[0], **call[1])
    with _recorded(model) as uses:
        compiled(*call[0], **call[1])
    return uses


def times_of(uses: dict[str, list[Use]], slow: tuple[str, ...], quantize_us: float = 0.001) -> MeasuredTimes:
    """Times by which float16 is faster for the products of the labels `slow`, and twice as slow for all others."""
    actual = {use.matrix: 10.0 for used in uses.values() for use in used}
    actual |= {use.matrix: 4.0 for label in slow for use in uses[label]}
    products = [
        ProductTime(kind=kind, m=m, n=n, k=k, adds=adds, int8_us=5, float16_us=us)
        for (kind, m, n, k, adds), us in actual.items()
    ]
    sources = {use.source for used in uses.values() for use in used if use.source is not None}
    before = [
        SourceTime(
            kind=kind, m=m, k=k, int8_us=quantize_us if kind == "quantize" else 2, float16_us=2 * (kind != "quantize")
        )
        for kind, m, k in sources
    ]
    return MeasuredTimes(software={}, products=tuple(products), before=tuple(before))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def use(times: MeasuredTimes) -> None:
        monkeypatch.setattr(engine_module, "measured_times", lambda *_: (GPU, times))

    return use


def kept_rows(layers: tuple[LayerExecution, ...]) -> dict[str, LayerExecution]:
    return {row.name: row for row in layers if not row.is_met and row.kind != "attention"}


def test_the_products_of_a_step_are_those_of_its_layers(quantized: nn.Module, call: Call) -> None:
    uses = uses_of(quantized, call)
    conv = quantized.get_submodule("mid_block.resnets.0.conv1")
    (use,) = uses["mid_block.resnets.0.conv1"]
    kind, m, n, k, adds = use.matrix
    assert not adds
    assert (kind, n, k) == ("conv", conv.weight_shape[0], torch.Size(conv.weight_shape[1:]).numel())  # type: ignore[arg-type,index]
    assert call[0][0].shape[0] * call[0][0].shape[2] * call[0][0].shape[3] % m == 0
    assert use.source is not None
    assert use.source[0] == "group_norm", "which hands over codes"
    whole = [use for label, used in uses.items() if label.endswith("conv_shortcut") for use in used]
    parts = [use for label, used in uses.items() if "conv_shortcut." in label for use in used]
    assert whole or parts
    assert all(use.source is None for use in whole), "the normalization of the block hands over these codes too"
    assert all(use.source == ("quantize", use.matrix[1], use.matrix[3]) for use in parts)
    projections = [use for label, used in uses.items() if label.endswith("proj_out") for use in used]
    assert projections
    assert all(use.source is None for use in projections), "the last product of the last block writes them"
    gated = [use for used in uses.values() for use in used if use.matrix[0] == "geglu"]
    assert all(use.source == ("layer_norm", use.matrix[1], use.matrix[3]) for use in gated)
    assert any(use.matrix[0] == "geglu" for used in uses.values() for use in used)


def test_what_float16_runs_faster_is_kept_with_the_reason(quantized: nn.Module, call: Call, measure: Any) -> None:
    uses = uses_of(quantized, call)
    label = "mid_block.resnets.0.conv1"
    alike = {other for other, used in uses.items() if used[0].matrix == uses[label][0].matrix}
    measure(times_of(uses, (label,)))
    compiled = CudaEngine().compile(quantized, *call, CPU)
    rows = kept_rows(compiled.layers)
    assert set(rows) == alike, "what is measured is a size, so all layers of it are kept, and no other"
    assert rows[label].precision == "float32"
    assert rows[label].reason == f"float16 is faster at this size: 6.0 µs against 7.0 on {GPU}"
    exact = ReferenceEngine().compile(quantized, *call, CPU)(*call[0], **call[1])[0]
    everything_in_integers = CudaEngine(float_where_faster=False).compile(quantized, *call, CPU)
    assert not kept_rows(everything_in_integers.layers)
    apart = relative_l2(compiled(*call[0], **call[1])[0], exact)
    assert 0 < apart < 0.1, "the input of a kept layer is not rounded, and nothing else changes"
    again = CudaEngine().compile(quantized, *call, CPU)
    assert again.layers == compiled.layers
    assert torch.equal(again(*call[0], **call[1])[0], compiled(*call[0], **call[1])[0])


def test_a_kept_layer_multiplies_its_exported_codes(quantized: nn.Module, call: Call, measure: Any) -> None:
    uses = uses_of(quantized, call)
    measure(times_of(uses, ("mid_block.resnets.0.conv1",)))
    model = CudaEngine().compile(quantized, *call, CPU).model  # type: ignore[attr-defined]
    (product,) = (m for m in model.modules() if isinstance(m, FloatProduct) and m.label == "mid_block.resnets.0.conv1")
    layer: Any = quantized.get_submodule("mid_block.resnets.0.conv1")
    x = torch.randn(1, layer.weight_shape[1], 4, 4)
    layer.plan = layer.plan.model_copy(update={"activation_bits": None})
    assert torch.allclose(product(x), layer(x), atol=1e-6)


def test_projections_over_one_input_are_kept_together_as_one_product(
    quantized: nn.Module, call: Call, measure: Any
) -> None:
    uses = uses_of(quantized, call)
    merged = tuple(label for label in uses if "attn1.to_q + " in label)
    assert merged
    measure(times_of(uses, merged))
    compiled = CudaEngine().compile(quantized, *call, CPU)
    names = {name for label in merged for name in label.split(" + ")}
    assert names <= set(kept_rows(compiled.layers))
    attentions = [
        module
        for module in compiled.model.modules()  # type: ignore[attr-defined]
        if isinstance(module, FusedAttention) and not module.is_cross
    ]
    assert attentions
    assert all([p.label for p in a.inputs.consumers] in [[label] for label in merged] for a in attentions)
    exact = ReferenceEngine().compile(quantized, *call, CPU)(*call[0], **call[1])[0]
    assert relative_l2(compiled(*call[0], **call[1])[0], exact) < 0.1


def test_a_gated_product_and_what_reads_it_are_decided_by_their_sum(quantized: nn.Module, call: Call) -> None:
    uses = uses_of(quantized, call)
    (gated, *_) = (label for label, used in uses.items() if used[0].matrix[0] == "geglu")
    out = gated.replace("net.0.proj", "net.2")
    alone = faster_in_float(quantized, *call, torch.float16, GPU, times_of(uses, (gated,)))
    assert gated not in alone, "4 + 10 microseconds against 5 + 5"
    both = faster_in_float(quantized, *call, torch.float16, GPU, times_of(uses, (gated, out)))
    assert both[gated] == both[out]
    assert both[gated].endswith(f"10.0 µs against 12.0 on {GPU}, for 2 products that go together")


def test_a_quantization_by_itself_counts_for_the_integers(quantized: nn.Module, call: Call) -> None:
    uses = uses_of(quantized, call)
    times = times_of(uses, (), quantize_us=8.0)
    kept = faster_in_float(quantized, *call, torch.float16, GPU, times)
    alone = {label for label, used in uses.items() if all(use.source and use.source[0] == "quantize" for use in used)}
    assert set(kept) == {name for label in alone for name in label.split(" + ")} != set()
    assert not faster_in_float(quantized, *call, torch.float16, GPU, times_of(uses, ()))


def test_what_was_not_measured_stays_in_integers(quantized: nn.Module, call: Call) -> None:
    uses = uses_of(quantized, call)
    times = times_of(uses, tuple(uses))
    assert faster_in_float(quantized, *call, torch.float16, GPU, times)
    products = tuple(time.model_copy(update={"m": time.m + 1}) for time in times.products)
    other = MeasuredTimes(software={}, products=products, before=times.before)
    assert not faster_in_float(quantized, *call, torch.float16, GPU, other)
    unknown = MeasuredTimes(software={}, products=times.products)
    kept = faster_in_float(quantized, *call, torch.float16, GPU, unknown)
    normed = {
        name
        for label, used in uses.items()
        if used[0].source is not None and used[0].source[0] != "quantize"
        for name in label.split(" + ")
    }
    assert normed
    assert not normed & set(kept), "a normalization before a product must be known too"
    assert kept, "a quantization would only add to what integers take"


def test_times_that_are_level_change_nothing(quantized: nn.Module, call: Call) -> None:
    uses = uses_of(quantized, call)
    times = times_of(uses, tuple(uses))
    products = tuple(time.model_copy(update={"float16_us": 4.9}) for time in times.products)
    level = MeasuredTimes(software={}, products=products, before=times.before)
    assert not faster_in_float(quantized, *call, torch.float16, GPU, level)


def test_a_normalization_runs_once_for_layers_that_are_kept(quantized: nn.Module, call: Call, measure: Any) -> None:
    uses = uses_of(quantized, call)
    measure(times_of(uses, tuple(label for label in uses if "attn" in label)))
    model = CudaEngine().compile(quantized, *call, CPU).model  # type: ignore[attr-defined]
    norms = [norm for module in model.modules() for norm in getattr(module, "norms", [])]
    assert norms
    assert all(isinstance(norm, Normalization) and norm.is_fused != norm.needs_float for norm in norms)


def test_the_table_of_the_package_is_read_and_knows_nothing_of_a_cpu() -> None:
    for actual in table().values():
        assert len(actual.by_matrix) == len(actual.products), "a product is listed once"
        assert actual.software
    assert measured_times(torch.device("cpu"), torch.float16) is None
    with pytest.raises(ValidationError):
        MeasuredTimes.model_validate({"software": {}, "products": [{"kind": "linear", "m": 0, "n": 1, "k": 1}]})


def test_times_are_those_of_the_gpu_and_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    from edadm_cli.engines.cuda import times

    mine = MeasuredTimes(software={"torch": "2"}, products=())
    monkeypatch.setattr(times, "table", lambda: {GPU: mine})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU if device.index == 1 else "another")
    assert measured_times(torch.device("cuda", 1), torch.float16) == (GPU, mine)
    assert measured_times(torch.device("cuda", 1), torch.float32) is None
    assert measured_times(torch.device("cuda", 0), torch.float16) is None


def test_a_session_on_a_gpu_becomes_a_table(tmp_path: Path) -> None:
    import runpy

    script = runpy.run_path("benchmarks/product_times.py")
    lines = [
        {"section": "environment", "torch": "2.11.0", "triton": "3.6.0"},
        {"section": "environment", "gpu": GPU},
        {"section": "norms", "call": "quantize 2x320x64x64", "count": 3, "us": 3.0, "float16_us": 1.0},
        {"section": "norms", "call": "layer_norm_quantize 2x8x4", "count": 3, "us": 3.0, "float16_us": 1.0},
        layer("linear", 512, 320, 640, count=1, chosen_us=6.0, float16_us=4.0),
        layer("linear", 512, 320, 640, count=3, chosen_us=4.0, float16_us=5.0),
        {**layer("linear", 512, 320, 640, count=2, chosen_us=7.0, float16_us=9.0), "adds": True},
        {**layer("conv", 8, 8, 8, count=1, chosen_us=1.0, float16_us=1.0), "key": [90, "conv", 8, 8, 8, True]},
        {"section": "norms", "call": "group_norm_quantize 2x8x4x4", "count": 3, "us": 3.0, "float16_us": 1.0},
        {"section": "layers", "seconds": 3.0},
    ]
    source, target = tmp_path / "session.jsonl", tmp_path / "times.json"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target.write_text(json.dumps({"other": {"software": {}, "products": [], "before": []}}))
    script["write"](source, target)
    actual = json.loads(target.read_text())
    assert list(actual) == [GPU, "other"]
    times = MeasuredTimes.model_validate(actual[GPU])
    assert times.software == {"torch": "2.11.0", "triton": "3.6.0"}
    alone, added = times.products
    assert alone == ProductTime(kind="linear", m=512, n=320, k=640, adds=False, int8_us=4.5, float16_us=4.75)
    assert added == ProductTime(kind="linear", m=512, n=320, k=640, adds=True, int8_us=7.0, float16_us=9.0)
    assert times.before == (
        SourceTime(kind="layer_norm", m=16, k=4, int8_us=3.0, float16_us=1.0),
        SourceTime(kind="quantize", m=8192, k=320, int8_us=3.0, float16_us=0.0),
    )


def layer(kind: str, m: int, n: int, k: int, **values: float) -> dict[str, Any]:
    return {"section": "layers", "call": "a product", "key": [90, kind, m, n, k, False], "adds": False, **values}


def test_a_pointwise_convolution_in_floating_point_reads_a_range_of_channels_in_place() -> None:
    whole = torch.randn(2, 12, 5, 3).contiguous(memory_format=torch.channels_last)
    piece = whole[:, 4:10]
    weight, bias = torch.randn(7, 6, 1, 1), torch.randn(7)
    actual = FloatProduct(Operation("conv2d"), weight, bias, torch.float32).product(piece)
    assert torch.allclose(actual, torch.nn.functional.conv2d(piece, weight, bias), atol=1e-5)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert rows_of(piece).data_ptr() == piece.data_ptr(), "a view: nothing is copied"


def test_a_pointwise_convolution_over_two_images_copies_neither() -> None:
    whole = torch.randn(2, 12, 5, 3).contiguous(memory_format=torch.channels_last)
    first, second = (part.contiguous(memory_format=torch.channels_last) for part in whole.split([8, 4], dim=1))
    weight, bias = torch.randn(7, 12, 1, 1), torch.randn(7)
    product = FloatProduct(Operation("conv2d"), weight, bias, torch.float32)
    assert product.joins
    actual = product.join(first, second)
    assert torch.allclose(actual, torch.nn.functional.conv2d(whole, weight, bias), atol=1e-5)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert not FloatProduct(Operation("conv2d"), torch.randn(7, 12, 3, 3), bias, torch.float32).joins
