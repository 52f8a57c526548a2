"""Whole denoisers in ONNX: they predict what exact integers predict, say how each layer ran, and refuse the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import CompiledDenoiser, EngineOptions
from edadm_cli.engines.parity import compare_layers, relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.engines.registry import engine
from edadm_cli.errors import EXIT_MACHINE, InputError, MachineError, UsageError
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.recipe import LayerRule
from tests.denoisers import parts
from tests.denoisers.families import EVERYWHERE, tiny_denoiser

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from edadm_cli.engines.graph.description import DESCRIPTION_FILE  # noqa: E402
from edadm_cli.engines.onnx import OnnxRuntimeEngine  # noqa: E402
from edadm_cli.engines.onnx.engine import GRAPH_FILE  # noqa: E402
from edadm_cli.engines.onnx.export import export_onnx  # noqa: E402

Call = tuple[tuple[Any, ...], dict[str, Any]]
CPU = EngineOptions(torch.device("cpu"), num_threads=1)
# One code that falls to the other side of an edge, in some norm between two layers, and all that follows from it.
PREDICTION_BOUND = 0.05


def _nested_call(seed: int = 0, rows: int = 2, tokens: int = 8) -> Call:
    generator = torch.Generator().manual_seed(seed)
    kwargs = {
        "encoder_hidden_states": torch.randn(rows, tokens, 32, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, 16, generator=generator),
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * rows),
        },
    }
    return (torch.randn(rows, 4, 8, 8, generator=generator), torch.tensor(5)), kwargs


def _pixel_call(seed: int = 0, rows: int = 2, size: tuple[int, int] = (8, 8)) -> Call:
    sample = torch.randn(rows, 1, *size, generator=torch.Generator().manual_seed(seed))
    return (sample, torch.tensor(5)), {}


def _require_same_prediction(compiled: CompiledDenoiser, denoiser: nn.Module, call: Call) -> None:
    args, kwargs = call
    exact = ReferenceEngine().compile(denoiser, args, kwargs, CPU)
    expected, actual = exact(*args, **kwargs), compiled(*args, **kwargs)
    assert type(actual) is type(expected)
    assert relative_l2(prediction_of(actual), prediction_of(expected)) < PREDICTION_BOUND


def _require_same_layers(denoiser: nn.Module, call: Call) -> None:
    args, kwargs = call
    parity = compare_layers(OnnxRuntimeEngine(), denoiser, args, kwargs, CPU)
    assert len(parity.errors) + len(parity.refused) > 0
    assert parity.worst[1] <= OnnxRuntimeEngine.layer_bound


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    """A UNet of SDXL at W4A8: quantized attention, split shortcuts, excluded layers, edges with float inputs."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = parts.xl_unet(block_out_channels=(8,), attention_head_dim=2, mid_block_type=None, **blocks)
    unet.eval().requires_grad_(False)
    rules = (LayerRule(pattern="*.attn2.to_out.0", exclude=True),)
    recipe = EVERYWHERE.model_copy(update={"layers": rules, "sample_float_input": True, "output_float_input": True})
    quantize_to_nearest(unet, recipe, BitWidth.parse("w4a8"), [_nested_call(seed) for seed in range(2)])
    assert isinstance(unet, nn.Module)
    return unet


@pytest.fixture(scope="module")
def files(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    args, kwargs = _nested_call()
    OnnxRuntimeEngine(fixed_sizes=True).save(mixed, args, kwargs, CPU, folder)
    return folder


@pytest.fixture(scope="module")
def compiled(files: Path) -> CompiledDenoiser:
    return OnnxRuntimeEngine().load(files, CPU)


def test_a_mixed_denoiser_predicts_what_exact_integers_predict(compiled: CompiledDenoiser, mixed: nn.Module) -> None:
    assert any(name.endswith("part1") for name in quantized_layers(mixed))
    _require_same_prediction(compiled, mixed, _nested_call(seed=3))
    _require_same_layers(mixed, _nested_call(seed=3))
    args, kwargs = _nested_call()
    assert torch.equal(compiled(*args, **kwargs, return_dict=False)[0], compiled(args[0], timestep=5, **kwargs).sample)


def test_every_planned_layer_ran_in_integers_and_the_others_are_named(
    compiled: CompiledDenoiser, mixed: nn.Module
) -> None:
    rows = {row.name: row for row in compiled.layers}
    planned = [row for row in rows.values() if row.planned != "float"]
    assert {row.precision for row in planned} == {"int8"}
    assert len([row for row in planned if row.kind == "attention"]) == 6
    floating = {row.name for row in rows.values() if row.planned == "float"}
    assert floating == {"conv_in", "conv_out", *(name for name in rows if name.endswith("attn2.to_out.0"))}
    assert {rows[name].precision for name in floating} == {"float32"}
    assert quantized_layers(mixed).keys() <= rows.keys()


def test_a_layer_that_onnx_runtime_leaves_in_floating_point_is_reported(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edadm_cli.engines.onnx.session.in_integers", lambda model: None)
    rows = OnnxRuntimeEngine().load(files, CPU).layers
    unmet = [row for row in rows if not row.is_met]
    assert {row.kind for row in unmet} == {"conv2d", "linear"}
    assert all(row.precision == "float32" and "ONNX Runtime runs it as" in str(row.reason) for row in unmet)


def test_a_profile_names_layers_and_precisions(compiled: CompiledDenoiser) -> None:
    args, kwargs = _nested_call()
    rows = compiled.profile(*args, **kwargs)
    by_name = {row.name: row for row in rows}
    first = by_name["down_blocks.0.resnets.0.conv1"]
    assert (first.kind, first.precision) == ("conv2d", "int8")
    assert [row.precision for row in rows if row.kind == "conv2d"].count("float32") == 2, "the edges"
    assert {"conv2d", "linear", "attention", "norm", "quantize", "reorder", "elementwise"} == {row.kind for row in rows}
    assert all(row.milliseconds >= 0 for row in rows)


def test_the_file_is_standard_and_holds_four_bit_weights(files: Path, mixed: nn.Module) -> None:
    onnx.checker.check_model(str(files / GRAPH_FILE), full_check=True)
    model = onnx.load(files / GRAPH_FILE)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert not {node.domain for node in model.graph.node} - {""}
    four = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4}
    assert four == {f"{name}.weight" for name, layer in quantized_layers(mixed).items() if layer.plan.weight_bits == 4}
    unsigned = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".zero_point")]
    assert {tensor.data_type for tensor in unsigned} == {onnx.TensorProto.UINT8}


def test_the_denoiser_is_not_changed(files: Path, mixed: nn.Module) -> None:
    assert all(layer.arithmetic == "fake-quantize" for layer in quantized_layers(mixed).values())
    args, kwargs = _nested_call()
    assert mixed(*args, **kwargs).sample.shape == args[0].shape


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": 1}, "cannot run the graph with sample"),
        ({"tokens": 5}, "cannot run the graph with sample"),
    ],
)
def test_other_sizes_than_fixed_ones_are_refused(
    compiled: CompiledDenoiser, change: dict[str, Any], sentence: str
) -> None:
    args, kwargs = _nested_call(**change)
    with pytest.raises(InputError, match=sentence):
        compiled(*args, **kwargs)


def test_a_call_with_other_arguments_is_refused(compiled: CompiledDenoiser) -> None:
    args, kwargs = _nested_call()
    with pytest.raises(InputError, match=r"'cross_attention_kwargs\.scale'"):
        compiled(*args, **kwargs, cross_attention_kwargs={"scale": 0.5})
    del kwargs["added_cond_kwargs"]["time_ids"]
    with pytest.raises(InputError, match=r"no 'added_cond_kwargs\.time_ids'"):
        compiled(*args, **kwargs)


def _without_graph(folder: Path) -> None:
    (folder / GRAPH_FILE).unlink()


def _truncated(folder: Path) -> None:
    graph = folder / GRAPH_FILE
    graph.write_bytes(graph.read_bytes()[:2000])


def _of_another_version(folder: Path) -> None:
    described = json.loads((folder / DESCRIPTION_FILE).read_text())
    (folder / DESCRIPTION_FILE).write_text(json.dumps({**described, "format_version": 1, "of_that_version": 0}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without_graph, "holds no denoiser.onnx"),
        (_truncated, "no ONNX graph of a quantized denoiser"),
        (
            _of_another_version,
            "of another version of edadm: their format is 1, and the engine 'onnxruntime' reads format 2",
        ),
    ],
)
def test_broken_files_are_refused(files: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    for name in (GRAPH_FILE, DESCRIPTION_FILE):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence):
        OnnxRuntimeEngine().load(tmp_path, CPU)


def test_sizes_are_free_and_paddings_may_be_uneven() -> None:
    """A pixel-space UNet whose down-sampler pads one side only, in calls of other sizes than it was made from."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    unet = parts.pixel_unet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), downsample_padding=0, **blocks
    )
    unet.eval().requires_grad_(False)
    quantize_to_nearest(unet, EVERYWHERE, BitWidth.parse("w8a8"), [_pixel_call(seed) for seed in range(2)])
    compiled = OnnxRuntimeEngine().compile(unet, *_pixel_call(rows=1), CPU)
    for rows, size in ((1, (8, 8)), (3, (8, 12)), (2, (16, 4))):
        _require_same_prediction(compiled, unet, _pixel_call(seed=5, rows=rows, size=size))
    _require_same_layers(unet, _pixel_call(seed=5))
    with pytest.raises(InputError, match="cannot run the graph"):
        compiled(torch.randn(1, 1, 7, 7), 5)


@pytest.mark.parametrize(("family", "bits"), [("unet", "w4g16a8"), ("dit", "w4a8")])
def test_other_architectures(family: str, bits: str) -> None:
    denoiser, call = tiny_denoiser(family)
    quantize_to_nearest(denoiser, EVERYWHERE, BitWidth.parse(bits), [call])
    compiled = OnnxRuntimeEngine(fixed_sizes=True).compile(denoiser, *call, CPU)
    assert all(row.is_met for row in compiled.layers)
    _require_same_prediction(compiled, denoiser, call)
    _require_same_layers(denoiser, call)


class _Tiny(nn.Module):
    """The least that is called like a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (self.conv(sample) + timestep[0],)


def _tiny(activations: Tensor) -> tuple[_Tiny, Call]:
    torch.manual_seed(0)
    denoiser, call = _Tiny(), ((activations, torch.tensor([5.0])), {})
    quantize_to_nearest(denoiser, EVERYWHERE, BitWidth.parse("w4a6"), [call])
    return denoiser, call


def test_tensorrt_reads_symmetric_activations_only(tmp_path: Path) -> None:
    skewed, call = _tiny(torch.rand(1, 4, 6, 6))
    with pytest.raises(UsageError, match="1 layers have a zero-point off the middle of their grid, such as 'conv'"):
        export_onnx(skewed, *call, tmp_path / "model.onnx", "tensorrt")
    denoiser, call = _tiny(torch.randn(1, 4, 6, 6))
    layer = quantized_layers(denoiser)["conv"]
    half = 1 << (layer.plan.activation_bits or 0) - 1
    layer.set_parameters(layer.weight_int, layer.weight_scale, layer.input_scale, torch.tensor(half))
    export_onnx(denoiser, *call, tmp_path / "model.onnx", "tensorrt")
    zero = next(t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if t.name == "conv.input.zero_point")
    assert (zero.data_type, onnx.numpy_helper.to_array(zero)) == (onnx.TensorProto.INT8, 0)


def test_the_engine_is_registered_and_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = engine("onnxruntime")
    assert isinstance(actual, OnnxRuntimeEngine)
    assert actual.refusal(torch.device("cpu")) is None
    denoiser, call = _tiny(torch.randn(1, 4, 6, 6))
    with pytest.raises(UsageError, match="float32, not in bfloat16"):
        actual.compile(denoiser, *call, EngineOptions(torch.device("cpu"), torch.bfloat16))
    with pytest.raises(MachineError, match="on CPUs only"):
        actual.compile(denoiser, *call, EngineOptions(torch.device("cuda")))
    monkeypatch.setattr("edadm_cli.engines.onnx.engine.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"needs onnx, onnxruntime, onnxscript.*edadm\[onnx\]") as refused:
        actual.compile(denoiser, *call, CPU)
    assert refused.value.exit_code == EXIT_MACHINE


def test_latents_that_a_unet_cannot_halve_are_fixed_in_their_size_only(capfd: pytest.CaptureFixture[str]) -> None:
    from tests.unit.engines.conftest import call_of

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    unet = parts.unet(block_out_channels=(8, 8), mid_block_type=None, **blocks).eval().requires_grad_(False)
    call = call_of(seed=1, rows=2, size=9)
    quantize_to_nearest(unet, EVERYWHERE, BitWidth.parse("w4a8"), [call])
    compiled = OnnxRuntimeEngine().compile(unet, *call, CPU)
    exact = ReferenceEngine().compile(unet, *call, CPU)
    for other in (call, call_of(seed=2, rows=3, size=9)):
        actual = prediction_of(compiled(*other[0], **other[1]))
        assert relative_l2(actual, prediction_of(exact(*other[0], **other[1]))) < PREDICTION_BOUND
    assert capfd.readouterr().err == "", "the form that was tried first leaves no word on the terminal"
    with pytest.raises(InputError, match="ONNX Runtime cannot run the graph with"):
        even = call_of(seed=2, rows=2, size=8)
        compiled(*even[0], **even[1])


def test_what_has_no_form_is_said_in_one_plain_sentence() -> None:
    from edadm_cli.engines.onnx import export

    colours = (
        "Failed to export the model. \x1b[96mThis is step 1/3\x1b[0m\n\n## Please report\n\nint_truediv has no size"
    )
    assert export._reason(RuntimeError(colours)) == "int_truediv has no size"
