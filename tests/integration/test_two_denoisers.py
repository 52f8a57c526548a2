"""A pipeline with two denoisers: every artifact has a part for each, and an export has both in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.artifacts import RunFolder, Selection, Sensitivity, load_tensors
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.config import (
    BenchConfig,
    BitWidth,
    CollectConfig,
    ExportConfig,
    ReconstructConfig,
    SelectConfig,
    SensitivityConfig,
)
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.quant.plan import QuantizationPlan, joined
from edadm_cli.recipe import load_recipe
from tests.denoisers import table, videos

STEPS = 4
W8A8 = BitWidth.parse("w8a8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from edadm_cli.collect import stage as collect
    from edadm_cli.export import stage as export
    from edadm_cli.reconstruct import stage as reconstruct
    from edadm_cli.select import stage as select

    folder = tmp_path_factory.mktemp("wan22")
    torch.manual_seed(0)
    videos.wan22().save_pretrained(folder / "model")
    run = RunFolder(folder / "run")
    with table.entry_with({"height": 16, "width": 16, "num_frames": 5}):
        collect.run(CollectConfig(model=str(folder / "model"), num_trajectories=2, num_steps=STEPS, device="cpu"), run)
    select.run(SelectConfig(device="cpu"), run)
    recipe = load_recipe("quick")
    reconstruct.run(ReconstructConfig(bits=W8A8, recipe=recipe, device="cpu"), run)
    export.run(ExportConfig(bits=W8A8, device="cpu", parity_samples=1), run)
    return run


def test_the_steps_of_a_sampler_are_shared_out_between_the_denoisers(run: RunFolder) -> None:
    collected, selected = run.open("collect"), run.open("select")
    timesteps = {}
    for place in ("", "transformer_2"):
        timesteps[place] = collected.within(place).tensors("features.safetensors", ["timesteps"])["timesteps"]
        chosen = selected.within(place).tensors("calibration.safetensors", ["timestep"])["timestep"]
        assert set(chosen.tolist()) <= set(timesteps[place].tolist())
        assert Selection.load(selected.within(place)).counts != ()
    assert sum(len(steps) for steps in timesteps.values()) == STEPS
    assert timesteps[""].min() > timesteps["transformer_2"].max()


def test_an_export_holds_the_codes_of_each_denoiser(run: RunFolder) -> None:
    export = run.open("export", "w8a8")
    facts = export.json("export.json")
    assert facts["further_denoisers"] == ["transformer_2"]
    name = "blocks.0.ffn.net.2.weight_int"
    codes = {}
    for place, component in (("", "transformer"), ("transformer_2", "transformer_2")):
        stored = load_tensors(export.path / component / "diffusion_pytorch_model.safetensors")
        codes[place] = run.open("reconstruct", "w8a8").within(place).tensors("quant_params.safetensors", [name])[name]
        weights = [tensor for key, tensor in stored.items() if key.startswith("blocks.0.ffn.net.2.")]
        assert any(tensor.dtype == torch.int8 and torch.equal(tensor, codes[place]) for tensor in weights)
    assert not torch.equal(codes[""], codes["transformer_2"])


def test_an_engine_runs_each_denoiser_at_its_steps(run: RunFolder) -> None:
    import edadm_cli
    from edadm_cli.engines.pipeline import EngineDenoiser

    export = run.open("export", "w8a8").path
    frames, calls = {}, {}
    for engine in ("torch", "openvino"):
        pipeline = edadm_cli.load(export, engine=engine, device="cpu")
        denoisers = {name: getattr(pipeline, name) for name in ("transformer", "transformer_2")}
        assert all(isinstance(each, EngineDenoiser) for each in denoisers.values()) == (engine != "torch")
        calls[engine] = {name: _counted(denoiser) for name, denoiser in denoisers.items()}
        call = {"prompt": "a cat", "num_inference_steps": STEPS, "output_type": "pt"}
        call |= {"height": 16, "width": 16, "num_frames": 5}
        frames[engine] = pipeline(**call, generator=torch.Generator().manual_seed(0)).frames
    assert calls["openvino"] == calls["torch"]
    assert all(len(each) > 0 for each in calls["torch"].values())
    assert 0 < float((frames["openvino"] - frames["torch"]).square().mean().sqrt()) < 0.02
    files = run.open("engine", "w8a8-openvino")
    names = {entry.path for entry in files.manifest.payload}
    assert {"denoiser.xml", "transformer_2/denoiser.xml"} <= names
    assert files.within("transformer_2").json("denoiser.json")["interface"]["denoiser"] == "WanTransformer3DModel"


def _counted(denoiser: torch.nn.Module) -> list[float]:
    """Returns a list that receives the timestep of every later call of a denoiser."""
    timesteps: list[float] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timesteps.append(float(kwargs["timestep"].flatten()[0]))

    denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    return timesteps


def test_diffusers_runs_both_denoisers_under_torch_compile(run: RunFolder) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(run.open("export", "w8a8").path)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": STEPS, "output_type": "pt"}
    call |= {"height": 16, "width": 16, "num_frames": 5}
    frames = []
    for is_compiled in (False, True):
        if is_compiled:
            for name in ("transformer", "transformer_2"):
                getattr(pipeline, name).compile(fullgraph=True, backend="eager")
        frames.append(pipeline(**call, generator=torch.Generator().manual_seed(0)).frames)
    assert torch.equal(*frames)


def test_a_bench_of_whole_images_is_refused_before_anything_is_measured(run: RunFolder) -> None:
    from edadm_cli.bench.request import resolve

    settings: dict[str, Any] = {"bits": (W8A8,), "device": "cpu"}
    assert resolve(BenchConfig(**settings), run).subject.title.startswith("the first of 2 denoisers")
    with pytest.raises(UsageError, match="has 2 denoisers, and bench --pipeline takes one"):
        resolve(BenchConfig(**settings, pipeline=True), run)


@pytest.fixture(scope="module")
def sensitivity(run: RunFolder) -> Sensitivity:
    from edadm_cli.sensitivity import stage

    settings: dict[str, Any] = {"weight_bits": (2, 4, 8), "activation_bits": (8,), "num_samples": 2, "num_images": 1}
    stage.run(SensitivityConfig(recipe=load_recipe("quick"), device="cpu", **settings), run)
    return Sensitivity.load(run.open("sensitivity"))


def _plans(run: RunFolder, bits: BitWidth) -> dict[str, QuantizationPlan]:
    artifact = run.open("reconstruct", str(bits))
    return {place: load_plan(artifact.within(place)) for place in CollectedRun.open(run).places}


def test_layers_of_all_denoisers_are_ranked_together(run: RunFolder, sensitivity: Sensitivity) -> None:
    assert {layer.name for layer in sensitivity.layers} == set(joined(_plans(run, W8A8)).layers)
    assert len(sensitivity.step_gains) == STEPS
    for layer in sensitivity.layers:
        is_second = layer.name.startswith("transformer_2.")
        assert layer.unit.startswith("transformer_2.") == is_second
        assert layer.weight_errors[2] > layer.weight_errors[8] > 0


def test_the_gain_of_the_last_step_is_that_of_the_second_denoiser(run: RunFolder, sensitivity: Sensitivity) -> None:
    """Euler's last step adds the prediction, times the last noise level, to the final sample."""
    scheduler = CollectedRun.open(run).load(torch.device("cpu"), torch.float32).pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    assert sensitivity.step_gains[-1] == pytest.approx(float(scheduler.sigmas[-2]) ** 2, rel=1e-3)


def test_an_average_of_bits_is_shared_by_all_denoisers(run: RunFolder, sensitivity: Sensitivity) -> None:
    from edadm_cli.reconstruct import stage as reconstruct

    bits = BitWidth.parse("auto:4a8")
    reconstruct.run(ReconstructConfig(bits=bits, recipe=load_recipe("quick"), device="cpu"), run)
    plan = joined(_plans(run, bits)).layers
    spent = sum(plan[layer.name].weight_bits * layer.num_weights for layer in sensitivity.layers)
    assert 0.9 < spent / (4 * sum(layer.num_weights for layer in sensitivity.layers)) <= 1
    assert {layer.weight_bits for layer in plan.values()} == {2, 4, 8}


def test_a_size_is_that_of_all_denoisers(run: RunFolder, sensitivity: Sensitivity) -> None:
    """Their weights stay on disk here, so that the sizes of the layers are those of the files."""
    from edadm_cli.export import stage as export
    from edadm_cli.reconstruct import stage as reconstruct

    bits = BitWidth.parse("auto:0.09MiB")
    reconstruct.run(ReconstructConfig(bits=bits, recipe=load_recipe("quick"), device="cpu", weights="disk"), run)
    export.run(ExportConfig(bits=bits, device="cpu", parity_samples=1, measure=False), run)
    folder = run.open("export", str(bits)).path
    files = [folder / name / "diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_2")]
    assert 0.8 < sum(file.stat().st_size for file in files) / (0.09 * 2**20) <= 1


def test_a_denoiser_that_is_never_called_is_named(run: RunFolder, tmp_path: Path) -> None:
    from edadm_cli.collect import stage as collect

    model = run.root.parent / "model"
    config = CollectConfig(model=str(model), num_trajectories=1, num_steps=1, device="cpu")
    with (
        table.entry_with({"height": 16, "width": 16, "num_frames": 5}),
        pytest.raises(InputError, match="'transformer_2'"),
    ):
        collect.run(config, RunFolder(tmp_path / "run"))
