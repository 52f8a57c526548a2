"""`collect` on tiny pipelines: what it writes, that it repeats, and that it survives a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import building
from edadm_cli.collect import stage as collect
from edadm_cli.config import CollectConfig, SelectConfig
from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.estimates import collect as collect_estimates
from edadm_cli.estimates import select as select_estimates
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, record_calls
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.pipeline_calls.seeds import image_seed
from edadm_cli.processes import ALONE
from edadm_cli.report.commands import repeating_commands
from edadm_cli.report.contents import read_run
from edadm_cli.select import stage as select
from tests.integration.collect.helpers import CPU, STEPS, TRAJECTORIES, config_of, hashes, latents_of
from tests.integration.fresh_interpreter import FreshInterpreter

KILLED_RUN = """
import sys, time
from pathlib import Path
from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import building, stage
from edadm_cli.config import CollectConfig

write_shard = building.write_shard
def slow(folder, index, recorder, dtype):
    if index == 1:  # the smaller one, 2, comes before it
        print("in the last shard", flush=True)
        time.sleep(600)
    write_shard(folder, index, recorder, dtype)
building.write_shard = slow
stage.run(CollectConfig.model_validate_json(sys.argv[1]), RunFolder(Path(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("name", "num_calls", "branches"),
    [("tiny-sd", STEPS + 1, 2), ("tiny-ddpm", STEPS, 1), ("tiny-dit", STEPS, 2), ("tiny-sdxl", STEPS, 2)],
)
def test_a_collection_holds_what_tools_outside_rely_on(
    collected: dict[str, RunFolder], name: str, num_calls: int, branches: int
) -> None:
    artifact = collected[name].open("collect")
    latents, shared = latents_of(artifact), artifact.tensors("features.safetensors")
    assert latents.shape[:2] == (num_calls, TRAJECTORIES)
    assert latents.dtype == torch.float32
    assert shared["timesteps"].shape == (num_calls,)
    assert shared["timesteps"].diff().le(0).all()
    assert shared["features"].shape[:2] == (num_calls, 6 * branches)
    condition = artifact.tensors("condition.safetensors")
    assert all(len(tensor) == TRAJECTORIES for tensor in condition.values())
    names = {
        "tiny-sd": ["encoder_hidden_states"],
        "tiny-ddpm": [],
        "tiny-dit": ["class_labels"],
        "tiny-sdxl": ["encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"],
    }[name]
    assert set(condition) == {f"condition.{part}{name}" for name in names for part in ("", "unconditional.")}
    files = {entry.path for entry in artifact.manifest.payload}
    shards = {f"latents-{index:05d}.safetensors" for index in range(3)}
    assert files == shards | {"features.safetensors", "condition.safetensors", "call.json", "sampling.json"}


def test_the_trajectories_are_those_of_a_plain_sampling(collected: dict[str, RunFolder], tiny_sd: Path) -> None:
    artifact = collected["tiny-sd"].open("collect")
    model, calls = load_model(str(tiny_sd), CPU, torch.float32), []
    seeds = [image_seed(0, index) for index in range(4)]
    with record_calls(model.denoiser, calls.append):
        sample(model, seeds=seeds, prompts=["one", "two", "three", "one"], num_steps=STEPS, guidance_scale=None)
    expected = torch.stack([call.sample[4:] for call in calls])
    assert torch.equal(latents_of(artifact)[:, :4], expected)
    sampling = artifact.json("sampling.json")
    assert sampling["prompts"][:4] == ["one", "two", "three", "one"]
    assert sampling["seeds"][:4] == seeds
    assert sampling["guidance_scale"] == 7.5
    assert sampling["scheduler"]["class"] == "PNDMScheduler"


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-ddpm", "tiny-dit", "tiny-sdxl"])
def test_a_calibration_call_is_the_recorded_call(
    collected: dict[str, RunFolder], name: str, request: pytest.FixtureRequest
) -> None:
    run, folder = collected[name], request.getfixturevalue(name.replace("-", "_"))
    select.run(SelectConfig(), run)
    calibration_set = CalibrationSet.load(run.open("select"))
    assert len(calibration_set) == TRAJECTORIES
    assert calibration_set.trajectory_index.tolist() == list(range(TRAJECTORIES))
    sampling = run.open("collect").json("sampling.json")
    model = load_model(str(folder), CPU, torch.float32)
    calls: list[DenoiserCall] = []
    outputs: list[Tensor] = []
    with record_calls(model.denoiser, calls.append):
        hook = model.denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        sample(
            model,
            seeds=sampling["seeds"][:4],
            prompts=None if sampling["prompts"] is None else sampling["prompts"][:4],
            num_steps=STEPS,
            guidance_scale=sampling["guidance_scale"],
        )
        hook.remove()
    is_swapped = name == "tiny-dit"  # its pipeline puts the conditional rows first
    for index in range(4):
        step = int(calibration_set.step_index[index])
        rows = [index] if calibration_set.branches == 1 else [index, 4 + index]
        args, kwargs = calibration_set.call([index], CPU, torch.float32)
        with torch.no_grad():
            output = model.denoiser(*args, **kwargs)[0]
        expected = outputs[step][rows[::-1] if is_swapped else rows]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_collecting_again_is_up_to_date_and_other_settings_are_refused(
    sd_run: RunFolder, tiny_sd: Path, prompts: Path
) -> None:
    before = hashes(sd_run.root)
    config = config_of(tiny_sd, prompts)
    assert collect.run(config, sd_run).status == "up_to_date"
    with pytest.raises(InputError, match="num_steps"):
        collect.run(config_of(tiny_sd, prompts, num_steps=3), sd_run)
    other = prompts.with_name("other.txt")
    other.write_text("four\n")
    with pytest.raises(InputError, match="prompts_sha256"):
        collect.run(config_of(tiny_sd, other), sd_run)
    assert hashes(sd_run.root) == before
    assert collect.run(config_of(tiny_sd, prompts, num_steps=3), sd_run, force=True).status == "done"


def test_a_default_and_the_same_value_given_are_one_identity(tiny_ddpm: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    given = collect.run(config_of(tiny_ddpm, None, num_steps=None, num_trajectories=2), run)
    named = collect.run(config_of(tiny_ddpm, None, num_steps=50, num_trajectories=2), run)
    assert given.num_steps == 50
    assert named.status == "up_to_date"


def test_equal_settings_give_equal_bytes(
    collected: dict[str, RunFolder], tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    again = RunFolder(tmp_path / "again")
    for run in (again, collected["tiny-sd"]):
        collect.run(config_of(tiny_sd, prompts), run)
        select.run(SelectConfig(), run)
    for kind in ("collect", "select"):
        assert hashes(again.path(kind)) == hashes(collected["tiny-sd"].path(kind))
    other = RunFolder(tmp_path / "other")
    collect.run(config_of(tiny_sd, prompts, seed=1), other)
    assert not torch.equal(latents_of(other.open("collect")), latents_of(again.open("collect")))


def test_a_killed_collect_goes_on_at_its_shard_and_ends_with_the_same_bytes(
    collected: dict[str, RunFolder],
    tiny_sd: Path,
    prompts: Path,
    fresh_interpreter: FreshInterpreter,
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path / "killed")
    config = config_of(tiny_sd, prompts)
    running = fresh_interpreter.start(KILLED_RUN, config.model_dump_json(), run.root)
    assert running.stdout.readline() == "in the last shard\n"
    assert running.kill() == -signal.SIGKILL
    running.close()
    assert not run.path("collect").exists()
    (partial,) = run.root.glob(".collect.partial-*")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("latents-*")}
    assert len(kept) == 2

    assert collect.run(config, run).status == "done"
    assert hashes(run.path("collect")) == hashes(collected["tiny-sd"].path("collect"))
    for name, written in kept.items():
        assert (run.path("collect") / name).stat().st_mtime_ns == written, "a finished shard was sampled again"
    assert not list(run.root.glob(".collect.partial-*"))


@pytest.mark.parametrize("left", ["both", "condition only", "parts half gone"])
def test_a_collect_killed_while_it_merged_ends_with_the_same_bytes(
    collected: dict[str, RunFolder],
    tiny_ddpm: Path,
    tmp_path: Path,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = RunFolder(tmp_path / "run"), config_of(tiny_ddpm, None)

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "_sampling", die)
        collect.run(config, run)
    (partial,) = run.root.glob(".collect.partial-*")
    if left == "condition only":
        (partial / "features.safetensors").unlink()
    if left == "parts half gone":
        (partial / "part-00000.safetensors").unlink()
    collect.run(config, run)
    assert hashes(run.path("collect")) == hashes(collected["tiny-ddpm"].path("collect"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_in_half_the_bytes(
    tiny_sd: Path, prompts: Path, tmp_path: Path, dtype: str, collected: dict[str, RunFolder]
) -> None:
    run = RunFolder(tmp_path / "run")
    collect.run(config_of(tiny_sd, prompts, dtype=dtype), run)
    artifact = run.open("collect")
    latents = latents_of(artifact)
    assert latents.dtype == getattr(torch, dtype)
    assert artifact.tensors("features.safetensors", ["features"])["features"].dtype == getattr(torch, dtype)
    full = latents_of(collected["tiny-sd"].open("collect"))
    assert (latents - full).norm() / full.norm() < 0.05
    select.run(SelectConfig(), run)
    args, kwargs = CalibrationSet.load(run.open("select")).call([0, 1], CPU, torch.float32)
    assert args[0].dtype == kwargs["encoder_hidden_states"].dtype == torch.float32


def test_weights_that_end_in_infinity_name_the_step(tiny_ddpm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_ddpm, tmp_path / "model"))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"].fill_(3e38)
    save_file(tensors, weights)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"not finite .* from step 1 on, timestep 500"):
        collect.run(config_of(folder, None), run)
    assert not run.path("collect").exists()


def test_a_prompt_file_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    config = CollectConfig(model="no-such-model", prompts=tmp_path / "empty.txt")
    with pytest.raises(InputError, match="holds no prompt"):
        collect.prepare(config, ALONE)


def test_what_a_model_does_not_have_is_refused(tiny_ddpm: Path, prompts: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError, match="no guidance"):
        collect.run(config_of(tiny_ddpm, None, guidance_scale=2.0), run)
    with pytest.raises(UsageError, match="takes no prompts"):
        collect.run(config_of(tiny_ddpm, None).model_copy(update={"prompts": prompts}), run)
    with pytest.raises(UsageError, match=r"DDIMPipeline has no argument 'height', so --height has no meaning"):
        collect.run(config_of(tiny_ddpm, None, height=16, width=16), run)


def test_a_given_size_is_that_of_all_later_images_and_part_of_the_identity(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    run, changes = RunFolder(tmp_path / "run"), {"num_trajectories": 2, "num_steps": 2, "height": 16, "width": 32}
    collect.run(config_of(tiny_sd, prompts, **changes), run)
    artifact = run.open("collect")
    scale = 32 // latents_of(artifact).shape[-1]
    assert latents_of(artifact).shape[-2:] == (16 // scale, 32 // scale)
    assert artifact.manifest.config["call_arguments"] == {"height": 16, "width": 32}
    model = CollectedRun.open(run).load(CPU, torch.float32)
    images = sample(model, seeds=[0], prompts=["one"], num_steps=2, guidance_scale=2.0).images
    assert images.shape[-2:] == (16, 32)
    (command,) = repeating_commands(read_run(run, None))
    assert "--height 16 --width 32" in command
    with pytest.raises(InputError, match="call_arguments"):
        collect.run(config_of(tiny_sd, prompts, **{**changes, "height": 32}), run)
    with pytest.raises(UsageError, match="given together"):
        collect.run(config_of(tiny_sd, prompts, height=16), RunFolder(tmp_path / "odd"))
    with pytest.raises(InputError, match="divisible by"):
        collect.run(config_of(tiny_sd, prompts, **{**changes, "height": 17}), RunFolder(tmp_path / "odd"))


def test_more_memory_than_a_machine_can_have_is_a_failure_of_the_machine(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_sd, prompts, num_trajectories=1, height=2**24, width=2**24)  # latents of 2**50 bytes
    with pytest.raises(MachineError, match="ran out of memory"):
        collect.run(config, RunFolder(tmp_path / "run"))


def test_a_quantized_denoiser_is_refused(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "tiny-sd"))
    config = folder / "unet/config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))
    with pytest.raises(InputError, match=r"'unet' of .* is quantized already by 'bitsandbytes'"):
        collect.run(config_of(folder, prompts), RunFolder(tmp_path / "run"))


@pytest.mark.usefixtures("processor_clock")
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_ddpm"])
def test_an_estimate_writes_nothing_and_is_near(
    name: str, request: pytest.FixtureRequest, prompts: Path, tmp_path: Path
) -> None:
    run, config = RunFolder(tmp_path / "run"), config_of(request.getfixturevalue(name), prompts)
    estimate = collect_estimates.estimate(config, run)
    assert not run.root.exists()
    start = time.perf_counter()
    collect.run(config, run)
    seconds = time.perf_counter() - start
    assert estimate.seconds < 20 * seconds
    assert estimate.memory_mib > 0
    on_disk = sum(path.stat().st_size for path in run.path("collect").rglob("*.safetensors")) / 2**20
    assert on_disk < 1.1 * estimate.disk_mib < 3 * on_disk + 0.1
    chosen = select_estimates.estimate(SelectConfig(), run)
    assert not run.path("select").exists()
    select.run(SelectConfig(), run)
    size = (run.path("select") / "calibration.safetensors").stat().st_size / 2**20
    assert chosen.disk_mib == pytest.approx(size, rel=0.4)


def test_records_are_plain_json(sd_run: RunFolder, tiny_sd: Path, prompts: Path) -> None:
    record = json.loads(collect.run(config_of(tiny_sd, prompts), sd_run).model_dump_json())
    assert (record["model"], record["num_steps"], record["num_trajectories"]) == (str(tiny_sd), STEPS, TRAJECTORIES)
    assert record["identity"] == sd_run.open("collect").identity
