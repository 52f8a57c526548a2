"""`reconstruct` and `export` on tiny pipelines: every recipe and bit width, names, resume by bytes, parity, size."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edadm_cli.artifacts import Artifact, RunFolder, Units, load_tensors
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.engines.reference import layer_parity, use_arithmetic
from edadm_cli.errors import EdadmError, InputError, UsageError
from edadm_cli.estimates import export as export_estimates
from edadm_cli.estimates import reconstruct as reconstruct_estimates
from edadm_cli.export import round_trip
from edadm_cli.export import stage as export
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError
from edadm_cli.quant.groups import LARGEST_MULTIPLIER
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.recipe import LayerRule, LearnRecipe, Recipe, load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.report import stage as report
from tests.integration.fresh_interpreter import FreshInterpreter

FreshRun = Callable[[Path], RunFolder]
CPU = torch.device("cpu")
RECIPES = ("default", "default-attention", "paper", "ptq4dm", "q-diffusion", "rtn")  # the others are one field away
BITS = ("w8a8", "w6a6", "w4g16a8", "w4a8", "w4a4", "w3a5")


def quick(name: str, **changes: Any) -> Recipe:
    """A shipped recipe with three iterations a unit and a coarse search."""
    recipe = load_recipe(name)
    parts = {
        "learn": recipe.learn.model_copy(update={"iterations": 3, "batch_size": 4}),
        "ranges": recipe.ranges.model_copy(update={"num_candidates": 8}),
    }
    return recipe.model_copy(update={**parts, **changes})


def config_of(bits: str = "w4a8", recipe: Recipe | None = None, **changes: Any) -> ReconstructConfig:
    fields = {"bits": BitWidth.parse(bits), "recipe": recipe or quick("default"), "device": "cpu"}
    return ReconstructConfig(**{**fields, "batch_size": 3, **changes})


def payload(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.payload}


def exported(run: RunFolder, bits: str = "w4a8") -> Any:
    return export.run(ExportConfig(bits=BitWidth.parse(bits), device="cpu", parity_samples=1), run)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_ddpm"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_and_exports(
    model: str, recipe: str, fresh_run: FreshRun, request: pytest.FixtureRequest
) -> None:
    run = fresh_run(request.getfixturevalue(model))
    # the bit widths go round, so that each is met with several recipes and with both models
    bits = BITS[(RECIPES.index(recipe) + (model == "tiny_sd")) % len(BITS)]
    record = reconstruct.run(config_of(bits, quick(recipe)), run)
    assert (record.status, record.bits, record.recipe) == ("done", bits, recipe)
    assert record.coverage.planned == record.coverage.quantized > 40
    assert record.coverage.kept == 0
    assert (record.loss.first is None) == (recipe in ("rtn", "ptq4dm"))
    done = exported(run, bits)
    assert done.parity.images_bit_equal
    assert done.parity.latent_max_abs == 0.0
    assert done.parity.integer_rel_l2 <= done.parity.integer_bound == 1e-5
    assert exported(run, bits).status == "up_to_date"


def test_weights_that_stay_on_disk_give_the_same_reconstruction(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    """But for the last bits of sums: torch adds up mapped and allocated weights in another order."""
    actual = []
    for weights in ("memory", "disk"):
        run = fresh_run(tiny_ddpm)
        record = reconstruct.run(config_of(weights=weights, units=("mid_block.*",)), run)
        assert record.loss.last is not None
        actual.append((record, run.open("reconstruct", "w4a8").tensors("quant_params.safetensors")))
    (memory, codes), (disk, same_codes) = actual
    assert memory.identity == disk.identity
    assert disk.loss.last == pytest.approx(memory.loss.last, rel=1e-2)
    assert codes.keys() == same_codes.keys()
    for name, tensor in codes.items():
        if name.endswith("weight_scale"):
            assert torch.equal(tensor, same_codes[name])
        if name.endswith("weight_int"):
            assert float((tensor == same_codes[name]).float().mean()) > 0.99


@pytest.mark.parametrize("recipe", ["default", "quick"])
def test_a_pattern_that_matches_no_unit_is_refused(recipe: str, tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    with pytest.raises(UsageError, match=r"'nothing\*' of --units matches none of the"):
        reconstruct.run(config_of("w4a8", quick(recipe), units=("nothing*",)), fresh_run(tiny_ddpm))


@pytest.mark.parametrize(
    ("weights", "table", "field", "value"),
    [
        ("disk", "ranges", "float_input_share", 0.05),
        ("auto", "ranges", "float_input_share", 0.05),
        ("disk", "learn", "network_iterations", 2),
    ],
)
def test_weights_on_disk_have_no_gradients(
    weights: str,
    table: str,
    field: str,
    value: float,
    tiny_ddpm: Path,
    fresh_run: FreshRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edadm_cli.models.collected.memory_of", lambda _: 1)
    recipe = quick("default")
    recipe = recipe.model_copy(update={table: getattr(recipe, table).model_copy(update={field: value})})
    with pytest.raises(UsageError, match="backward pass, which needs all weights in memory") as caught:
        reconstruct.run(config_of(recipe=recipe, weights=weights), fresh_run(tiny_ddpm))
    assert f"{field} = 0" in str(caught.value.hint)


def test_all_units_learn_together_at_the_end(tiny_sd: Path, fresh_run: FreshRun) -> None:
    """The report and the estimate know of it."""
    run, recipe = fresh_run(tiny_sd), quick("network-wise")
    numbers = {"network_iterations": 4, "network_samples": 5, "network_batch_size": 4}
    recipe = recipe.model_copy(update={"learn": recipe.learn.model_copy(update=numbers)})
    reconstruct.run(config_of("w3a8", recipe), run)
    together = Units.load(run.open("reconstruct", "w3a8")).together
    assert together is not None
    assert together.loss_before == pytest.approx(1, rel=1e-3)
    assert len(together.curve) == 4
    assert exported(run, "w3a8").parity.images_bit_equal
    page = report.run(run).read_text(encoding="utf-8")
    expected = "stay as each had learned" if together.is_nearest else f"{together.loss_after:.0%} of what it was"
    assert expected in page
    with_more = recipe.model_copy(update={"learn": recipe.learn.model_copy(update={"network_iterations": 100_000})})
    seconds = [reconstruct_estimates.estimate(config_of("w3a8", each), run).seconds for each in (recipe, with_more)]
    assert seconds[1] > 10 * seconds[0]


def test_without_gradients_of_the_sampler_all_steps_count_alike(
    tiny_ddpm: Path, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NoGradientError("tiny has no gradient of its final samples.")

    run, recipe = fresh_run(tiny_ddpm), quick("network-wise")
    numbers = {"network_iterations": 2, "network_samples": 5, "network_batch_size": 4}
    learn = recipe.learn.model_copy(update=numbers)
    record = reconstruct.run(config_of("w3a8", recipe.model_copy(update={"learn": learn})), run)
    assert not record.warnings
    params = run.open("reconstruct", "w3a8").tensors("quant_params.safetensors")
    monkeypatch.setattr("edadm_cli.reconstruct.step_effects.error_effects", refuse)
    record = reconstruct.run(config_of("w3a8", recipe.model_copy(update={"learn": learn})), run, force=True)
    assert [warning for warning in record.warnings if "all sampler steps count alike" in warning]
    alike = run.open("reconstruct", "w3a8").tensors("quant_params.safetensors")
    assert any(not torch.equal(alike[name], params[name]) for name in params)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_width_uses_its_codes_and_no_others(bits: str, tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_ddpm)
    recipe = quick("rtn", edge_weight_bits=None, edge_activation_bits=None)
    reconstruct.run(config_of(bits, recipe), run)
    width = BitWidth.parse(bits)
    largest = (2 ** (width.weight - 1) - 1) * (1 if width.group_size is None else LARGEST_MULTIPLIER)
    params = run.open("reconstruct", bits).tensors("quant_params.safetensors")
    codes = torch.cat([tensor.flatten() for name, tensor in params.items() if name.endswith("weight_int")])
    assert codes.dtype == torch.int8
    assert (int(codes.min()), int(codes.max())) == (-largest, largest)


def test_tensors_have_the_names_that_other_tools_rely_on(tiny_sd: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_sd)
    reconstruct.run(config_of(recipe=quick("paper")), run)
    artifact = run.open("reconstruct", "w4a8")
    params, plan = artifact.tensors("quant_params.safetensors"), artifact.json("plan.json")
    expected = set()
    for name, layer in plan["layers"].items():
        parts = [f"{name}.part0", f"{name}.part1"] if layer.get("channel_parts") else [name]
        keys = ["weight_int", "weight_scale"]
        keys += ["input_scale", "input_zero_point"] if layer.get("activation_bits") else []
        expected |= {f"{part}.{key}" for part in parts for key in keys}
    expected |= {f"{name}.{operand}_scale" for name in plan["attentions"] for operand in "qkvp"}
    assert set(params) == expected
    assert "up_blocks.0.resnets.0.conv_shortcut.part1.weight_int" in params
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.p_scale" in params
    assert "conv_out.input_scale" not in params, "paper leaves it unquantized"
    model = load_model(str(tiny_sd), CPU, torch.float32)
    weight = model.denoiser.get_submodule("mid_block.resnets.0.conv1").weight
    assert params["mid_block.resnets.0.conv1.weight_int"].shape == weight.shape
    assert params["mid_block.resnets.0.conv1.weight_scale"].shape == weight.shape[:1]
    for key, dtype in (("input_scale", torch.float32), ("input_zero_point", torch.int32)):
        tensor = params[f"mid_block.resnets.0.conv1.{key}"]
        assert (tensor.shape, tensor.dtype) == ((), dtype)
    assert set(payload(artifact)) == {"quant_params.safetensors", "plan.json", "units.json"}


def test_the_summary_names_every_unit(tiny_sd: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_sd)
    record = reconstruct.run(config_of(recipe=quick("default")), run)
    summary = run.open("reconstruct", "w4a8").json("units.json")
    assert record.units == len(summary["units"])
    plan = run.open("reconstruct", "w4a8").json("plan.json")
    layers = [name for unit in summary["units"] for name in unit["layers"]]
    assert sorted(layers) == sorted(plan["layers"])
    assert sum(summary["by_kind"].values()) == record.coverage.planned
    assert record.loss.first == pytest.approx(sum(unit["loss_before"] for unit in summary["units"]))
    assert record.loss.last == pytest.approx(sum(unit["loss_after"] for unit in summary["units"]))
    assert all(len(unit["curve"]) == 3 for unit in summary["units"])


def test_a_second_run_is_up_to_date_and_another_needs_force(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_ddpm)
    first = reconstruct.run(config_of(), run)
    again = reconstruct.run(config_of(memory_budget_mib=64), run)
    assert (again.status, again.identity) == ("up_to_date", first.identity)
    assert (again.coverage, again.loss, again.units) == (first.coverage, first.loss, first.units)
    with pytest.raises(EdadmError, match="seed"):
        reconstruct.run(config_of(seed=1), run)
    forced = reconstruct.run(config_of(seed=1), run, force=True)
    assert (forced.status, forced.identity != first.identity) == ("done", True)


KILLED = """
import os, signal, sys
from pathlib import Path
from edadm_cli.artifacts import RunFolder
from edadm_cli.config import ReconstructConfig
from edadm_cli.reconstruct import stage
from edadm_cli.reconstruct.checkpoint import UnitCheckpoints

save, after = UnitCheckpoints.save, int(sys.argv[3])
def save_and_die(self, index, unit, result):
    save(self, index, unit, result)
    if index == after:
        os.kill(os.getpid(), signal.SIGKILL)
UnitCheckpoints.save = save_and_die
stage.run(ReconstructConfig.model_validate_json(sys.argv[1]), RunFolder(Path(sys.argv[2])))
"""


@pytest.mark.parametrize(("model", "after"), [("tiny_sd", 9), ("tiny_ddpm", 2)])
def test_killed_between_units_it_ends_with_the_bytes_of_an_undisturbed_run(
    model: str, after: int, fresh_run: FreshRun, fresh_interpreter: FreshInterpreter, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    # everything random is on: dropped inputs, dropped activations, the order of rows
    config = config_of(recipe=quick("paper"))
    calm, disturbed = fresh_run(folder), fresh_run(folder)
    assert fresh_interpreter.run(KILLED, config.model_dump_json(), disturbed.root, after) == -signal.SIGKILL
    assert not disturbed.has("reconstruct", "w4a8")
    results = [reconstruct.run(config, run) for run in (calm, disturbed)]
    assert results[0].identity == results[1].identity
    first, second = (run.open("reconstruct", "w4a8") for run in (calm, disturbed))
    assert payload(first) == payload(second)
    assert not list((disturbed.root / "reconstruct").glob(".*partial*"))


def test_excluded_layers_stay_float_and_are_counted(tiny_sd: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_sd)
    rules = (LayerRule(pattern="*.attn2.*", exclude=True), LayerRule(pattern="*.ff.*", weight_bits=8))
    record = reconstruct.run(config_of(recipe=quick("default", layers=rules)), run)
    assert record.coverage.kept == 4 * 4
    exported(run)
    loaded = load_model(str(run.path("export", "w4a8")), CPU, torch.float32)
    original = load_model(str(tiny_sd), CPU, torch.float32)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    assert isinstance(loaded.denoiser.get_submodule(name), nn.Linear)
    assert torch.equal(loaded.denoiser.get_submodule(name).weight, original.denoiser.get_submodule(name).weight)
    feed_forward = loaded.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    assert feed_forward.plan.weight_bits == 8


def test_a_pattern_that_matches_nothing_leaves_the_run_as_it_was(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_ddpm)
    recipe = quick("default", layers=(LayerRule(pattern="transformer.*", exclude=True),))
    with pytest.raises(UsageError, match="matches none"):
        reconstruct.run(config_of(recipe=recipe), run)
    assert not run.has("reconstruct", "w4a8")


def test_activations_that_are_not_finite_are_refused(
    tiny_ddpm: Path, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load = fresh_run(tiny_ddpm), CalibrationSet.load.__func__  # type: ignore[attr-defined]

    def broken(cls: type, artifact: Artifact) -> CalibrationSet:
        actual: CalibrationSet = load(cls, artifact)
        actual.sample[-1] = float("nan")
        return actual

    monkeypatch.setattr(CalibrationSet, "load", classmethod(broken))
    with pytest.raises(InputError, match=r"input of '[\w.]+'.*not finite") as caught:
        reconstruct.run(config_of(), run)
    assert caught.value.exit_code == 3
    assert not run.has("reconstruct", "w4a8")


def test_steps_that_are_too_long_end_in_one_sentence(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    recipe = quick("default", learn=LearnRecipe(iterations=3, activation_learning_rate=1e38))
    with pytest.raises(InputError, match="not finite"):
        reconstruct.run(config_of(recipe=recipe), fresh_run(tiny_ddpm))


@pytest.mark.usefixtures("processor_clock")
def test_estimates_write_nothing_and_are_near(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_ddpm)

    def files() -> list[Path]:
        return sorted(path for path in run.root.rglob("*") if not path.name.endswith(".lock"))

    before = files()
    estimate = reconstruct_estimates.estimate(config_of(), run)
    assert files() == before
    seconds = reconstruct.run(config_of(), run).seconds
    assert seconds / 10 < estimate.seconds < 10 * seconds
    before = files()
    assert export_estimates.estimate(ExportConfig(bits=BitWidth.parse("w4a8"), device="cpu"), run).seconds > 0
    assert files() == before


def test_an_export_is_packed_and_says_how_large_it_is(tiny_sd: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_sd)
    reconstruct.run(config_of(), run)
    record = exported(run)
    folder = run.path("export", "w4a8")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_tensors(file)
    assert {t.dtype for name, t in tensors.items() if name.endswith("weight_codes")} == {torch.uint8, torch.int8}
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.endswith("_scale"))
    assert record.size_mib["unet"] >= file.stat().st_size / 2**20
    assert record.size_mib["ratio"] == pytest.approx(record.size_mib["denoiser_fp32"] / record.size_mib["unet"])
    original = load_model(str(tiny_sd), CPU, torch.float32).denoiser
    assert record.size_mib["denoiser_fp32"] == sum(p.numel() for p in original.parameters()) * 4 / 2**20
    for component in ("vae", "text_encoder"):
        for path in (tiny_sd / component).iterdir():
            assert (folder / component / path.name).read_bytes() == path.read_bytes()


def test_integer_arithmetic_is_near_and_not_the_same_code_path(tiny_ddpm: Path, fresh_run: FreshRun) -> None:
    run = fresh_run(tiny_ddpm)
    reconstruct.run(config_of(), run)
    exported(run)
    model = load_model(str(run.path("export", "w4a8")), CPU, torch.float32).denoiser
    call = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 90]))
    errors = layer_parity(model, call, {})
    assert set(errors) == set(quantized_layers(model))
    assert max(errors.values()) < 1e-5
    with torch.no_grad():
        fake = model(*call).sample
        assert use_arithmetic(model, "integer") == len(errors)
        integer = model(*call).sample
    assert not torch.equal(fake, integer)
    assert float((fake - integer).norm() / fake.norm()) < 0.05


def test_slow_models_are_compared_in_integers_layer_by_layer_only(
    tiny_ddpm: Path, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_trip, "INTEGER_SAMPLING_LIMIT", 0.0)
    run = fresh_run(tiny_ddpm)
    reconstruct.run(config_of(), run)
    record = exported(run)
    assert record.parity.integer_latent_rel_l2 is None
    assert record.parity.integer_rel_l2 is not None
    assert len(record.warnings) == 1
    assert "layer by layer" in record.warnings[0]


@pytest.mark.parametrize("model", ["tiny_dit", "tiny_sdxl"])
def test_other_architectures_go_the_same_way(model: str, fresh_run: FreshRun, request: pytest.FixtureRequest) -> None:
    """A transformer that embeds the timestep twice; a denoiser with nested conditions that its pipeline looks into."""
    run = fresh_run(request.getfixturevalue(model))
    record = reconstruct.run(config_of(recipe=quick("paper")), run)
    kept = run.open("reconstruct", "w4a8").json("plan.json").get("kept", {})
    reasons = {"runs more than once per forward"} if model == "tiny_dit" else set()
    assert (set(kept.values()), record.coverage.kept) == (reasons, 2 * len(reasons))
    assert exported(run).parity.images_bit_equal
