"""`edadm sensitivity` on a tiny pipeline: every layer is measured, bits follow, and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edadm_cli.artifacts import RunFolder, Sensitivity
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.cli.app import main
from edadm_cli.config import BitWidth, SensitivityConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.metrics.distances import relative_l2
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.quant.grid import weight_grid
from edadm_cli.quant.network import quantize_network
from edadm_cli.quant.search import weight_scales
from edadm_cli.recipe import load_recipe
from edadm_cli.report.stage import run as report
from edadm_cli.sensitivity import building
from edadm_cli.sensitivity.task import resolve_task


@pytest.fixture(scope="module")
def run_folder(few_blocks_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity") / "run"
    common = ["--run", str(folder), "--device", "cpu", "--quiet"]
    collect = [
        "collect",
        "--model",
        str(few_blocks_sd),
        "--num-trajectories",
        "8",
        "--num-steps",
        "4",
        "--batch-size",
        "8",
    ]
    assert main([*collect, *common]) == 0
    assert main(["select", "--strategy", "uniform", *common]) == 0
    widths = ["--weight-bits", "2,4,8", "--group-size", "16", "--activation-bits", "8"]
    assert main(["sensitivity", "--num-samples", "8", *widths, *common]) == 0
    return folder


def test_every_layer_is_measured_and_fewer_bits_cost_more(run_folder: Path) -> None:
    result = Sensitivity.load(RunFolder(run_folder).open("sensitivity"))
    assert all(set(layer.weight_errors) == {2, 4, 8} for layer in result.layers)
    totals = [sum(layer.weight_errors[bits] for layer in result.layers) for bits in (2, 4, 8)]
    assert totals[0] > totals[1] > totals[2] > 0
    assert all(set(layer.group_errors) == {2, 4} for layer in result.layers), "codes of eight bits have no groups"
    assert sum(layer.group_errors[4] for layer in result.layers) < totals[1]
    assert result.group_size == 16
    assert {layer.name for layer in result.layers} >= {"conv_in", "conv_out"}
    assert len(result.step_gains) >= 4


def test_the_error_at_eight_bits_is_the_distance_of_final_samples(run_folder: Path) -> None:
    """With one layer alone rounded to nearest, as the geometric mean over the images of the collection.

    Four random directions for each of eight images estimate it: one standard deviation is 14%.
    """
    run = RunFolder(run_folder)
    collected = CollectedRun.open(run)
    model = collected.load(torch.device("cpu"), torch.float32)
    denoiser, sampling = model.denoiser, collected.sampling

    def generate() -> torch.Tensor:
        prompts, steps = sampling.prompts, sampling.num_steps
        return sample(
            model, seeds=sampling.seeds, prompts=prompts, num_steps=steps, guidance_scale=sampling.guidance_scale
        ).latents

    exact = generate()
    result = Sensitivity.load(run.open("sensitivity"))
    by_name = {layer.name: layer for layer in result.layers}
    for name in ("conv_in", next(name for name in by_name if name.endswith(".conv2"))):
        layer = denoiser.get_submodule(name)
        weight = layer.get_parameter("weight")
        original = weight.detach().clone()
        scale = weight_scales(original, weight_grid(8), load_recipe("default").ranges)
        step = scale.view(-1, 1, 1, 1)
        with torch.no_grad():
            weight.copy_((original / step).round().clamp(-128, 127) * step)
        distance = relative_l2(generate(), exact).log().mean().exp()
        with torch.no_grad():
            weight.copy_(original)
        factor = by_name[name].learning_factor
        assert factor is not None
        assert (by_name[name].weight_errors[8] / factor) ** 0.5 == pytest.approx(float(distance), rel=0.4)


def test_steps_without_samples_at_the_end_are_steps_too(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of steps is that of the sampler, even where the calibration set has no sample of the last ones."""
    config = SensitivityConfig(recipe=load_recipe("quick"), device="cpu")
    task = resolve_task(config, RunFolder(run_folder))
    (part,) = building.parts_of(task)
    early = replace(part.calibration, step_index=part.calibration.step_index.clamp(max=1))
    monkeypatch.setattr(building.CalibrationSet, "load", lambda _: early)
    (with_early_samples,) = building.parts_of(task)
    assert with_early_samples.calibration is early
    assert with_early_samples.num_steps == part.num_steps >= 4


def test_bits_follow_the_measurement_and_keep_to_the_budget(run_folder: Path) -> None:
    common = ["--run", str(run_folder), "--device", "cpu", "--quiet"]
    assert main(["reconstruct", "--bits", "auto:3.5a8", "--recipe", "rtn", *common]) == 0
    run = RunFolder(run_folder)
    plan = json.loads((run.path("reconstruct", "w3.5a8") / "plan.json").read_text())["layers"]
    layers = {layer.name: layer for layer in Sensitivity.load(run.open("sensitivity")).layers}
    spent = sum(plan[name]["weight_bits"] * layer.num_weights for name, layer in layers.items())
    assert spent <= 3.5 * sum(layer.num_weights for layer in layers.values())
    assert len({layer["weight_bits"] for layer in plan.values()}) > 1
    assert [parent.kind for parent in run.open("reconstruct", "w3.5a8").manifest.parents] == ["select", "sensitivity"]


def test_layers_of_few_bits_have_groups_and_their_multipliers_are_in_the_average(run_folder: Path) -> None:
    common = ["--run", str(run_folder), "--device", "cpu", "--quiet"]
    assert main(["reconstruct", "--bits", "auto:4.5g16a8", "--recipe", "rtn", *common]) == 0
    run = RunFolder(run_folder)
    artifact = run.open("reconstruct", "w4.5g16a8")
    plan, params = load_plan(artifact).layers, artifact.tensors("quant_params.safetensors")
    layers = Sensitivity.load(run.open("sensitivity")).layers
    assert {(layer.weight_bits, layer.group_size) for layer in plan.values()} >= {(4, 16), (8, None)}
    assert all((layer.group_size == 16) == (layer.weight_bits <= 4) for layer in plan.values())
    spent = sum(plan[layer.name].weight_bits * layer.num_weights for layer in layers)
    spent += sum(4 * tensor.numel() for name, tensor in params.items() if name.endswith(".weight_multiplier"))
    assert 4 < spent / sum(layer.num_weights for layer in layers) <= 4.5


def test_the_report_ranks_the_layers(run_folder: Path) -> None:
    run = RunFolder(run_folder)
    page = report(run).read_text(encoding="utf-8")
    shown = page.split('id="sensitivity"')[1].split("</section>")[0]
    first, second = (layer.name for layer in Sensitivity.load(run.open("sensitivity")).ranked(2)[:2])
    assert 0 < shown.index(first) < shown.index(second)
    assert all(f">{width}<" in shown for width in ("W2", "W4", "W8", "A8"))


def test_a_size_is_kept_and_used(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers get two, four or eight bits until the file is as large as it may be: codes take as many bits on disk."""
    run = RunFolder(run_folder)
    denoiser = CollectedRun.open(run).load(torch.device("cpu"), torch.float32).denoiser
    common = ["--recipe", "rtn", "--run", str(run_folder), "--device", "cpu", "--quiet"]
    assert main(["reconstruct", "--bits", "auto:0.001MiB", *common]) == UsageError.exit_code
    smallest = float(capsys.readouterr().err.split("the denoiser takes ")[1].split(" MiB")[0])
    size = 1.15 * smallest
    assert main(["reconstruct", "--bits", f"auto:{size:.3f}MiB", *common]) == 0
    plan = load_plan(run.open("reconstruct", str(BitWidth.parse(f"auto:{size:.3f}MiB"))))
    assert {layer.weight_bits for layer in plan.layers.values()} == {2, 4, 8}
    quantize_network(denoiser, plan)
    save_file(denoiser.state_dict(), run_folder / "denoiser.safetensors")
    assert 0.9 * smallest < (run_folder / "denoiser.safetensors").stat().st_size / 2**20 <= size


def test_an_average_needs_the_measurement(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "run"
    for kind in ("collect", "select"):
        (other / kind).parent.mkdir(parents=True, exist_ok=True)
        (other / kind).symlink_to(run_folder / kind)
    assert main(["reconstruct", "--bits", "auto:3.5a8", "--run", str(other), "--device", "cpu"]) == InputError.exit_code
    assert "edadm sensitivity" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["auto:9a8", "auto:4.5", "w4.567a8", "auto:1.5a8", "auto:0MiB", "auto:4g4a8"])
def test_impossible_averages_are_usage_errors(bits: str, run_folder: Path) -> None:
    assert main(["reconstruct", "--bits", bits, "--run", str(run_folder)]) == UsageError.exit_code


def test_a_pipeline_without_gradients_gets_a_hint(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise NoGradientError("The final sample of this pipeline has no gradient.")

    for kind in ("collect", "select"):
        shutil.copytree(run_folder / kind, tmp_path / "run" / kind)
    monkeypatch.setattr(building, "record_images", refuse)
    arguments = ["sensitivity", "--num-samples", "8", "--run", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert main(arguments) == InputError.exit_code
    assert "edadm reconstruct --bits w4a8" in capsys.readouterr().err


def test_a_killed_measurement_goes_on(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured again, and the outcome is that of an undisturbed one."""
    measured = Sensitivity.load(RunFolder(run_folder).open("sensitivity"))
    for kind in ("collect", "select"):
        shutil.copytree(run_folder / kind, tmp_path / "run" / kind)
    again = [
        "sensitivity",
        "--num-samples",
        "8",
        "--weight-bits",
        "2,4,8",
        "--activation-bits",
        "8",
        "--group-size",
        "16",
    ]
    calls: list[int] = []
    original = building.measure_effects

    def interrupted(*args: object) -> object:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "measure_effects", interrupted)
    common = ["--run", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert main([*again, *common]) == 130
    assert main([*again, *common]) == 0
    assert len(calls) == 3, "the first half of the images is not measured again"
    resumed = Sensitivity.load(RunFolder(tmp_path / "run").open("sensitivity"))
    assert torch.allclose(torch.tensor(resumed.step_gains), torch.tensor(measured.step_gains))
    assert resumed.layers == measured.layers
