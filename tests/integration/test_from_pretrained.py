"""An export is a diffusers folder like any other: loaded in a fresh interpreter, saved again, refused when broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from edadm_cli.artifacts import RunFolder
from edadm_cli.cli.app import main
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.errors import InputError
from edadm_cli.export import stage as export
from edadm_cli.integrations import autoload
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from tests.integration.fresh_interpreter import FreshInterpreter
from tests.integration.small_runs import export as export_pipeline
from tests.unit.engines import toy_engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SEEDS, PROMPTS, STEPS, GUIDANCE = [11, 12], ["one", "two"], 3, 4.0
SAMPLING = """
import sys
{imports}
import torch
from diffusers import DiffusionPipeline
from PIL import Image
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
latents = pipeline(
    ["one", "two"], num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="latent"
).images
layers = sum(type(module).__name__ == "QuantizedLayer" for module in pipeline.unet.modules())
print(layers, "edadm_cli" in sys.modules)
torch.save(latents, sys.argv[2])
"""


@pytest.fixture(scope="module")
def run(tiny_sd: Path, selected: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with an export whose attention is quantized too."""
    place = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(selected(tiny_sd), place)
    folder, bits = RunFolder(place), BitWidth.parse("w4a8")
    recipe = load_recipe("paper")
    parts = {
        "learn": recipe.learn.model_copy(update={"iterations": 2, "batch_size": 4}),
        "ranges": recipe.ranges.model_copy(update={"num_candidates": 8}),
    }
    config = ReconstructConfig(bits=bits, recipe=recipe.model_copy(update=parts), device="cpu")
    reconstruct.run(config, folder)
    export.run(ExportConfig(bits=bits, device="cpu", parity_samples=1), folder)
    return folder


@pytest.fixture
def folder(run: RunFolder, tmp_path: Path) -> Path:
    """A copy of the export that a test may break."""
    return shutil.copytree(run.path("export", "w4a8"), tmp_path / "export")


def _latents(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    latents: torch.Tensor = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="latent",
    ).images
    return latents


def _images(pipeline: Any) -> list[Any]:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    actual = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
    return list(actual.images)


def _reconstructed(run: RunFolder) -> Any:
    """The full-precision pipeline with the reconstruction's parameters put in: what was before the export."""
    source, model = run.open("reconstruct", "w4a8"), CollectedRun.open(run).load(CPU, torch.float32)
    quantize_network(model.denoiser, QuantizationPlan.model_validate(source.json("plan.json")))
    load_quant_params(model.denoiser, source.tensors("quant_params.safetensors"))
    return model


def test_images_are_those_of_the_reconstruction_bit_for_bit(run: RunFolder) -> None:
    reconstructed = _reconstructed(run)
    loaded = DiffusionPipeline.from_pretrained(run.path("export", "w4a8"))
    assert torch.equal(_latents(loaded), _latents(reconstructed.pipeline))
    for ours, theirs in zip(_images(loaded), _images(reconstructed.pipeline), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    through_us = load_model(str(run.path("export", "w4a8")), CPU, torch.float32)
    arguments: dict[str, Any] = {"seeds": SEEDS, "prompts": PROMPTS, "num_steps": STEPS, "guidance_scale": GUIDANCE}
    assert torch.equal(sample(through_us, **arguments).images, sample(reconstructed, **arguments).images)


def _is_installed() -> bool:
    return any(entry.name == "edadm" for entry in importlib.metadata.entry_points(group="torch.backends"))


# Installed, the package is found through its entry point, without an import.
@pytest.mark.parametrize("imports", ["" if _is_installed() else "import edadm_cli", "import diffusers, edadm_cli"])
def test_a_fresh_interpreter_loads_it_with_plain_diffusers(
    run: RunFolder, imports: str, fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    script = SAMPLING.format(imports=imports)
    interpreter = [sys.executable, "-c", script]
    if imports.startswith("import diffusers"):  # as the program that the process forks from has done
        fresh_interpreter.write_program(tmp_path / "program", script)
        interpreter = [str(tmp_path / "program")]
    actual = subprocess.run(
        [*interpreter, run.path("export", "w4a8"), tmp_path / "latents.pt"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert actual.returncode == 0, actual.stderr
    assert actual.stderr.count("edadm_cli.load(folder)") == 1, "where the fast way is, once"
    reconstructed = _reconstructed(run)
    assert actual.stdout.split() == [str(len(quantized_layers(reconstructed.denoiser))), "True"]
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    if torch.get_num_threads() == 1 or os.environ.get("OMP_NUM_THREADS") == "1":
        assert torch.equal(latents, _latents(reconstructed.pipeline))
    else:
        torch.testing.assert_close(latents, _latents(reconstructed.pipeline))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_float32_in_narrow_arithmetic(run: RunFolder, dtype: torch.dtype) -> None:
    folder = run.path("export", "w4a8")
    exact = DiffusionPipeline.from_pretrained(folder).unet
    narrow = DiffusionPipeline.from_pretrained(folder, dtype=dtype).unet
    buffers = dict(narrow.named_buffers())
    for name, buffer in exact.named_buffers():
        assert torch.equal(buffers[name], buffer)
        assert buffers[name].dtype == buffer.dtype
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([7, 7]), torch.randn(2, 8, 16))
    with torch.no_grad():
        actual = narrow(inputs[0].to(dtype), inputs[1], inputs[2].to(dtype)).sample
        expected = exact(*inputs).sample
    assert actual.dtype == dtype
    assert float((actual.float() - expected).norm() / expected.norm()) < 0.2


def test_a_loaded_pipeline_is_saved_and_loaded_again(run: RunFolder, tmp_path: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(run.path("export", "w4a8"))
    loaded.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    first, second = loaded.unet.state_dict(), again.unet.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert torch.equal(_latents(loaded), _latents(again))
    configs = [
        json.loads((place / "unet" / "config.json").read_text())["quantization_config"]
        for place in (run.path("export", "w4a8"), tmp_path / "again")
    ]
    assert configs[0] == configs[1]


def test_what_is_quantized_is_known_from_the_folder(run: RunFolder) -> None:
    unet = DiffusionPipeline.from_pretrained(run.path("export", "w4a8")).unet
    assert isinstance(unet.mid_block.resnets[0].conv1, QuantizedLayer)
    assert unet.mid_block.resnets[0].conv1.weight_codes.dtype == torch.uint8
    processor = unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    assert isinstance(processor, QuantizedAttention)
    config = json.loads((run.path("export", "w4a8") / "unet" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["recipe"]) == ("edadm", "w4a8", "paper")


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


LAYER = "mid_block.resnets.0.conv1"
SCALE, CODES = f"{LAYER}.weight_scale", f"{LAYER}.weight_codes"


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: _change_weights(folder, lambda tensors: tensors.update({name: value(tensors[name])}))


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing scale": (lambda f: _change_weights(f, lambda t: t.pop(SCALE)), f"lack.*{SCALE}"),
    "missing codes": (lambda f: _change_weights(f, lambda t: t.pop(CODES)), f"lack.*{CODES}"),
    "missing bias": (lambda f: _change_weights(f, lambda t: t.pop("conv_norm_out.bias")), "lack.*conv_norm_out.bias"),
    "shape": (_set(CODES, lambda t: t[:-1].clone()), rf"'{CODES}' is torch.uint8 \["),
    "dtype": (_set(SCALE, lambda t: t.half()), rf"'{SCALE}' is torch.float16"),
    "unpacked": (_set(CODES, lambda t: t.to(torch.int8)), f"'{CODES}' is torch.int8"),
    "negative scale": (_set(SCALE, lambda t: -t), "not a positive number"),
    "infinite scale": (_set(f"{LAYER}.input_scale", lambda t: t / 0), "not a positive number"),
    "attention scale": (
        _set("mid_block.attentions.0.transformer_blocks.0.attn1.processor.q_scale", lambda t: t * 0),
        "not a positive number",
    ),
    "zero-point": (_set(f"{LAYER}.input_zero_point", lambda t: t * 0 + 256), "zero-point outside 0..255"),
    "future": (lambda f: _change_config(f, format_version=4), "format 4; this version of edadm reads formats up to 3"),
    "plan": (lambda f: _change_config(f, plan={"layers": {LAYER: {"weight_bits": 40}}}), "no valid plan"),
    "stranger": (
        lambda f: _change_config(f, plan={"layers": {"nowhere": {"weight_bits": 4}}}),
        "'nowhere', which UNet2DConditionModel does not have",
    ),
    "not a layer": (
        lambda f: _change_config(f, plan={"layers": {"conv_norm_out": {"weight_bits": 4}}}),
        "'conv_norm_out' cannot be quantized",
    ),
}


@pytest.mark.parametrize(("break_it", "sentence"), BREAKS.values(), ids=BREAKS.keys())
def test_a_broken_export_is_refused_in_one_sentence(
    folder: Path, break_it: Callable[[Path], None], sentence: str
) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        load_model(str(folder), CPU, torch.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=sentence):
        DiffusionPipeline.from_pretrained(folder)


def test_the_quantizer_is_registered_once() -> None:
    from diffusers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), list(sys.meta_path)
    autoload.register()
    autoload.register()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), list(sys.meta_path)) == before
    assert auto.AUTO_QUANTIZER_MAPPING["edadm"].__name__ == "EdadmQuantizer"
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["edadm"].__name__ == "EdadmConfig"


def test_registering_is_light_and_waits_for_diffusers() -> None:
    script = (
        "import sys, edadm_cli\n"
        "from edadm_cli.integrations.autoload import register\n"
        "register(); register()\n"
        "print(sum(type(finder).__name__ == '_Watch' for finder in sys.meta_path),"
        " 'torch' in sys.modules, 'diffusers' in sys.modules)\n"
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES\n"
        "print('edadm' in AUTO_QUANTIZER_MAPPING, 'edadm_cli.models.schedulers' in LOADABLE_CLASSES,"
        " sum(type(finder).__name__ == '_Watch' for finder in sys.meta_path))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    actual = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert actual.stdout.split() == ["3", "False", "False", "True", "True", "0"]


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module and its metadata, laid out as pip does."""
    site = tmp_path / "site"
    metadata = site / "toy-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(toy_engine.__file__, site / "a_toy_engine.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[edadm.engines]\ntoy = a_toy_engine:ToyEngine\nfailing = a_toy_engine:FailingEngine\n"
        "broken = a_toy_engine:replace\nwith-hyphen = a:b\ncuda = a:c\n"
    )
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("toy_package")
def test_an_engine_of_another_package_generates_images(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engines", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    listed = {row["name"]: row for row in printed["engines"]}
    assert listed["toy"]["description"] == "an engine of another package"
    assert listed["toy"]["refusals"]["cpu"] is None
    assert "with-hyphen" not in listed
    taken, misnamed = printed["warnings"]
    assert "'cuda' of another package (a:c) cannot be used: edadm itself has an engine of that name" in taken
    assert "'with-hyphen' of another package (a:b) cannot be used: names of engines consist of" in misnamed
    assert "edadm.engines" in listed["broken"]["refusals"]["cpu"]
    command = ["sample", "--run", str(run.root), "--bits", "w4a8", "--num-images", "1", "--device", "cpu"]
    images = []
    for engine in ("toy", "reference"):
        assert main([*command, "--engine", engine, "--json"]) == 0
        images.append(Path(json.loads(capsys.readouterr().out)["images"][0]))
    assert images[0] != images[1]
    assert Image.open(images[0]).tobytes() == Image.open(images[1]).tobytes()
    assert main([*command, "--engine", "broken"]) == 4


@pytest.mark.usefixtures("toy_package")
@pytest.mark.parametrize("command", [["sample", "--num-images", "1"], ["bench", "--no-compiled", "--rounds", "1"]])
def test_an_error_of_another_package_names_its_engine(
    run: RunFolder, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", str(run.root), "--bits", "w4a8", "--device", "cpu", "--engine", "failing"]
    threads = torch.get_num_threads()
    assert main([*command, *options]) == 4
    assert torch.get_num_threads() == threads
    message = capsys.readouterr().err
    assert "error: The engine 'failing' of another package failed in a_toy_engine: LookupError: no " in message
    assert "internal error" not in message
    assert "Traceback" not in message


def test_an_export_of_a_model_in_bfloat16_samples_as_it_is_loaded_by_default(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers loads denoisers in float32, and transformers a text encoder in the type of its configuration."""
    half = DiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/text_encoder/config.json").read_text())["dtype"] == "bfloat16"
    folder = export_pipeline(load_model(str(tmp_path / "model"), CPU, torch.float32), tmp_path / "export")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline.text_encoder.dtype == torch.float32
    assert len(pipeline("one", num_inference_steps=1, output_type="np").images) == 1
    assert DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).text_encoder.dtype == torch.bfloat16
