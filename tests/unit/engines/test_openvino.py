"""A whole denoiser in OpenVINO: the same outputs, other sizes, files, and what ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, LayerExecution
from edadm_cli.engines.graph.description import DESCRIPTION_FILE
from edadm_cli.engines.openvino import OpenVinoEngine, forms
from edadm_cli.engines.openvino.denoiser import OpenVinoDenoiser
from edadm_cli.engines.openvino.execution import runtime_nodes
from edadm_cli.engines.openvino.files import GRAPH_FILE, WEIGHTS_FILE, read
from edadm_cli.engines.openvino.int4 import widen
from edadm_cli.engines.openvino.products import quantized_products, source
from edadm_cli.engines.openvino.saturation import REASON, saturating_kinds
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.errors import EdadmError, InputError, MachineError
from edadm_cli.models.example_calls import example_call
from edadm_cli.recipe import LayerRule, Recipe
from tests.denoisers.families import EVERYWHERE

CPU = EngineOptions(torch.device("cpu"), num_threads=1)
RECIPE = EVERYWHERE.model_copy(
    update={"output_float_input": True, "layers": (LayerRule(pattern="*time_emb_proj", exclude=True),)}
)
# a code next to a tie may go the other way, and in these tiny networks one code is felt at the output
CLOSE = 0.1

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _denoiser(folder: Path, bits: str, recipe: Recipe = RECIPE) -> tuple[nn.Module, Call]:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    call = example_call(denoiser, batch_size=2)
    quantize_to_nearest(denoiser, recipe, BitWidth.parse(bits), [call])
    use_arithmetic(denoiser, "integer")
    return denoiser, call


@pytest.fixture(scope="module")
def denoiser_and_call(tiny_sd: Path) -> tuple[nn.Module, Call]:
    """W4A8 with split shortcuts, quantized attention, a float input, excluded layers."""
    return _denoiser(tiny_sd, "w4a8")


@pytest.fixture(scope="module")
def denoiser(denoiser_and_call: tuple[nn.Module, Call]) -> nn.Module:
    return denoiser_and_call[0]


@pytest.fixture(scope="module")
def call(denoiser_and_call: tuple[nn.Module, Call]) -> Call:
    return denoiser_and_call[1]


@pytest.fixture(scope="module")
def files(denoiser: nn.Module, call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    OpenVinoEngine().save(denoiser, *call, CPU, folder)
    return folder


@pytest.fixture(scope="module")
def compiled(files: Path) -> CompiledDenoiser:
    return OpenVinoEngine().load(files, CPU)


@torch.no_grad()
def _error(compiled: CompiledDenoiser, denoiser: nn.Module, call: Call) -> float:
    args, kwargs = call
    return relative_l2(compiled(*args, **kwargs).sample, denoiser(*args, **kwargs).sample)


def _runs_as_it_can(row: LayerExecution) -> bool:
    """As planned, or in floating point since this processor would sum it inexactly."""
    return row.is_met or (row.reason == REASON and row.kind in saturating_kinds())


def test_the_denoiser_itself(denoiser: nn.Module, call: Call) -> None:
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    modules = dict(denoiser.named_modules())
    compiled = OpenVinoEngine().compile(denoiser, *call, CPU)
    assert _error(compiled, denoiser, call) < CLOSE
    assert dict(denoiser.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_weights_in_groups(tiny_ddpm: Path) -> None:
    denoiser, call = _denoiser(tiny_ddpm, "w4g16a8")
    compiled = OpenVinoEngine().compile(denoiser, *call, CPU)
    assert {row.planned for row in compiled.layers} >= {"w4g16a8"}
    assert all(_runs_as_it_can(row) for row in compiled.layers)
    assert _error(compiled, denoiser, call) < CLOSE


def test_files_hold_the_same_denoiser(compiled: CompiledDenoiser, denoiser: nn.Module, call: Call) -> None:
    assert _error(compiled, denoiser, call) < CLOSE


@pytest.mark.parametrize(("rows", "size"), [(1, (8, 8)), (3, (16, 8))])
def test_other_batch_and_image_sizes(
    compiled: CompiledDenoiser, denoiser: nn.Module, rows: int, size: tuple[int, int]
) -> None:
    assert _error(compiled, denoiser, example_call(denoiser, batch_size=rows, seed=1, size=size)) < CLOSE


def test_masked_tokens_are_left_out(denoiser: nn.Module, call: Call) -> None:
    args, kwargs = call
    mask = torch.ones(kwargs["encoder_hidden_states"].shape[:2])
    mask[1, 2:] = 0
    masked: Call = args, {**kwargs, "encoder_attention_mask": mask}
    compiled = OpenVinoEngine().compile(denoiser, *masked, CPU)
    assert _error(compiled, denoiser, masked) < CLOSE
    states = kwargs["encoder_hidden_states"].clone()
    states[1, 2:] += 1
    changed = compiled(*args, **{**masked[1], "encoder_hidden_states": states}).sample
    assert torch.equal(changed, compiled(*args, **masked[1]).sample)


def test_a_prompt_is_projected_once(files: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, description = read(files)
    widen(graph)
    given = description.interface, description.layers, CPU, description.shapes
    compiled, plain = OpenVinoDenoiser(graph, *given), OpenVinoDenoiser(graph, *given, is_rewritten=False)
    computed = list[int]()
    once = next(iter(compiled._requests.values())).once
    assert once is not None
    compute = once.compiled.outputs

    def outputs(inputs: list[np.ndarray]) -> list[np.ndarray]:
        computed.append(1)
        return compute(inputs)

    monkeypatch.setattr(once.compiled, "outputs", outputs)
    args, kwargs = call
    first, second = kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states"] + 1
    for states, number in ((first, 1), (first.clone(), 1), (second, 2), (first, 2), (second + 1, 3), (first, 3)):
        prompt = {**kwargs, "encoder_hidden_states": states}
        assert relative_l2(compiled(*args, **prompt).sample, plain(*args, **prompt).sample) < CLOSE
        assert len(computed) == number
    assert {layer.precision for layer in compiled.layers if "attn2.to_k" in layer.name} == {"int8"}


def test_a_size_that_cannot_be_is_an_input_error(compiled: CompiledDenoiser, denoiser: nn.Module) -> None:
    args, kwargs = example_call(denoiser, batch_size=1, size=(7, 7))
    with pytest.raises(InputError, match=r"does not fit inputs of sample \[1, 4, 7, 7\]"):
        compiled(*args, **kwargs)


def test_output_class_and_element_type(compiled: CompiledDenoiser, denoiser: nn.Module, call: Call) -> None:
    args, kwargs = call
    assert type(compiled(*args, **kwargs)) is type(denoiser(*args, **kwargs))
    output = compiled(args[0].bfloat16(), 5, **kwargs, return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].dtype == torch.bfloat16


def test_outputs_do_not_share_memory(compiled: CompiledDenoiser, call: Call) -> None:
    args, kwargs = call
    first = compiled(*args, **kwargs).sample
    kept = first.clone()
    compiled(args[0] + 1, args[1], **kwargs)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class_labels": torch.zeros(2, dtype=torch.int64)},
            "'class_labels', but its graph was made for calls without",
        ),
        ({"encoder_hidden_states": None}, "no 'encoder_hidden_states', but its graph was made for calls with it"),
        (
            {"cross_attention_kwargs": {"scale": 0.5}},
            "'cross_attention_kwargs.scale', but its graph was made for calls",
        ),
    ],
)
def test_another_call_is_refused(compiled: CompiledDenoiser, call: Call, change: dict[str, Any], message: str) -> None:
    args, kwargs = call
    with pytest.raises(InputError, match=message):
        compiled(*args, **kwargs | change)


def test_every_layer_is_reported_with_what_ran(compiled: CompiledDenoiser) -> None:
    rows = {row.name: row for row in compiled.layers}
    assert all(map(_runs_as_it_can, rows.values()))
    assert {row.planned for row in rows.values()} == {"w4a8", "w8a8", "float"}
    floating = {name for name, row in rows.items() if row.precision == "float32" and row.reason is None}
    assert floating == {name for name in rows if "time_emb_proj" in name} | {"conv_out"}
    assert {row.kind for row in rows.values()} == {"conv2d", "linear", "attention"}
    attention = rows["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert attention.precision == ("float32" if "attention" in saturating_kinds() else "int8")


def test_layers_are_those_of_the_shape_that_ran_last(
    files: Path, denoiser: nn.Module, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor may run a layer of one shape in another form than that of another shape."""
    measured = iter([{}, {"conv_in": "it is faster in floating point"}])
    monkeypatch.setattr(forms, "use_faster_forms", lambda *_: next(measured))
    compiled = OpenVinoEngine().load(files, CPU)
    first = compiled.layers
    args, kwargs = example_call(denoiser, batch_size=1)
    compiled(*args, **kwargs)
    assert compiled.layers != first
    compiled(*call[0], **call[1])
    assert compiled.layers == first


def test_profile_names_layers_and_times(compiled: CompiledDenoiser, call: Call) -> None:
    args, kwargs = call
    rows = compiled.profile(*args, **kwargs)
    named = {row.name for row in rows}
    once_per_prompt = {row.name for row in compiled.layers if row.name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert {row.name for row in compiled.layers} - named == once_per_prompt
    assert sum(row.milliseconds for row in rows) > 0
    kinds = {row.name: row.kind for row in rows}
    assert kinds["down_blocks.0.resnets.0.conv1"] == "conv2d"
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1"] == "attention"


def test_four_bit_weights_take_four_bits(files: Path, denoiser: nn.Module) -> None:
    types = {
        node.get_output_element_type(0).get_type_name()
        for node in ov.Core().read_model(files / GRAPH_FILE).get_ops()
        if node.get_type_name() == "Constant"
    }
    assert {"i4", "i8"} <= types
    state = sum(tensor.nbytes for tensor in denoiser.state_dict().values())
    assert (files / WEIGHTS_FILE).stat().st_size < 1.5 * state


def test_both_products_of_every_attention_are_measured_with_the_projections(files: Path) -> None:
    graph, description = read(files)
    graph.reshape(dict(zip(description.interface.inputs, map(list, description.shapes), strict=True)))
    widen(graph)
    operations = forms._operations(list(quantized_products(graph)))
    attention = [operation for operation in operations if operation.is_attention]
    assert {len(operation.indices) for operation in attention} == {2}
    for form in attention[0].candidates:
        request, inputs = forms._compiled(graph, attention[0], {}, form)
        request.infer(inputs)
        names = str([node.sources for node in runtime_nodes(request.get_compiled_model())])
        assert all(projection in names for projection in ("to_q", "to_k", "to_v")), names


def test_operands_of_attention_are_quantized_before_they_are_moved(files: Path) -> None:
    graph, _ = read(files)
    attention = [product for product in quantized_products(graph) if product.kind == "attention"]
    quantizers = [source(product.node.input_value(port)) for product in attention for port in (0, 1)]
    above = {quantizer.input_value(0).get_node().get_type_name() for quantizer in quantizers}
    assert above == {"MatMul", "Softmax"}, "projections and probabilities"


@pytest.mark.parametrize("form", ["bytes quantized last", "scores in bytes"])
def test_every_form_of_attention_computes_the_denoiser(
    files: Path, denoiser: nn.Module, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: forms.Form
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for limit in ("LEAST_WORK", "_LEAST_SHARE", "_LEAST_ATTENTION"):
        monkeypatch.setattr(forms, limit, 0)
    monkeypatch.setattr(
        forms, "_fastest_form", lambda _graph, operation, _properties: form if operation.is_attention else "bytes"
    )
    compiled = OpenVinoEngine().load(files, CPU)
    assert _error(compiled, denoiser, call) < CLOSE
    attention = [row for row in compiled.layers if row.kind == "attention"]
    if form == "bytes quantized last":
        assert all(map(_runs_as_it_can, attention))
    else:
        assert {(row.is_met, row.reason) for row in attention} == {(False, forms.REASONS[form])}


@pytest.mark.parametrize("name", [GRAPH_FILE, WEIGHTS_FILE, DESCRIPTION_FILE])
def test_a_missing_or_broken_file_is_an_input_error(files: Path, tmp_path: Path, name: str) -> None:
    for file in files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError):
        OpenVinoEngine().load(tmp_path, CPU)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        OpenVinoEngine().load(tmp_path, CPU)


@pytest.mark.parametrize(("fixture", "bits"), [("tiny_ddpm", "w8a8"), ("tiny_sdxl", "w8a8"), ("tiny_dit", "w6a6")])
def test_other_architectures(fixture: str, bits: str, request: pytest.FixtureRequest) -> None:
    recipe = Recipe(name="test", ranges=RECIPE.ranges)
    denoiser, call = _denoiser(request.getfixturevalue(fixture), bits, recipe)
    compiled = OpenVinoEngine().compile(denoiser, *call, CPU)
    assert _error(compiled, denoiser, call) < CLOSE
    assert all(map(_runs_as_it_can, compiled.layers))


def test_what_cannot_be_traced_is_one_sentence() -> None:
    class Untraceable(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            raise RuntimeError("this module does not trace")

    with pytest.raises(EdadmError, match=r"OpenVINO cannot convert Untraceable: this module does not trace"):
        OpenVinoEngine().compile(Untraceable(), (torch.zeros(1, 3), torch.tensor(1)), {}, CPU)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.special.bessel_j0, "it does not translate aten::special_bessel_j0"),
        (lambda x: torch.view_as_real(torch.view_as_complex(x).exp()), "it computes exp of complex numbers"),
    ],
)
def test_what_the_converter_does_not_translate_is_one_sentence_with_a_way_out(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    class Rotating(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (function(sample),)

    sentence = rf"(?m)^OpenVINO cannot convert Rotating: {reason}$"
    with pytest.raises(EdadmError, match=sentence) as caught:
        OpenVinoEngine().compile(Rotating(), (torch.ones(1, 3, 2), torch.tensor(1)), {}, CPU)
    assert "engine='torch'" in (caught.value.hint or "")


def test_a_denoiser_may_need_an_argument_that_is_none_and_read_a_weight_s_type() -> None:
    """Kandinsky 2.2 is called with None for an argument without a default; Z-Image reads its weights' element type."""

    class Peculiar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor]:
            assert encoder_hidden_states is None
            return (self.layer(sample.to(self.layer.weight.dtype)) + timestep.reshape(-1, 1, 1),)

    torch.manual_seed(0)
    denoiser, call = Peculiar(), ((torch.randn(2, 6, 16), torch.tensor(3), None), {})
    quantize_to_nearest(denoiser, Recipe(name="test", ranges=RECIPE.ranges), BitWidth.parse("w8a8"), [call])
    use_arithmetic(denoiser, "integer")
    compiled = OpenVinoEngine().compile(denoiser, *call, CPU)
    with torch.no_grad():
        assert relative_l2(compiled(*call[0])[0], denoiser(*call[0])[0]) < 1e-3


def test_a_precision_or_device_that_the_machine_lacks() -> None:
    engine = OpenVinoEngine()
    assert engine.refusal(torch.device("cpu")) is None
    with pytest.raises(MachineError, match="cpu only"):
        engine.compile(nn.Identity(), (), {}, EngineOptions(torch.device("cuda")))
    with pytest.raises(MachineError, match="does not compute in float64"):
        engine.compile(nn.Identity(), (), {}, EngineOptions(torch.device("cpu"), torch.float64))
