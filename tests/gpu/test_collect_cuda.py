"""Collecting on CUDA: the same noise as on the CPU, nearly the same trajectories, in each element type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import CollectConfig, SelectConfig
from edadm_cli.estimates import collect as collect_estimates
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loading import load_model
from edadm_cli.select import stage as select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Relative L2 of a trajectory over four steps: mantissas of 10 bits (float32 as TF32), 7 bits and 10 bits.
BOUNDS = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 1e-2}


def latents_of(artifact: Artifact) -> Tensor:
    names = sorted(e.path for e in artifact.manifest.payload if e.path.startswith("latents-"))
    return torch.cat([artifact.tensors(name)["latents"] for name in names], dim=1)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_ddpm", "tiny_dit"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_cuda_collects_what_the_cpu_collects(
    name: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if (name, dtype) == ("tiny_ddpm", "bfloat16"):
        pytest.skip("diffusers' pipeline hands its images to numpy, which has no bfloat16")
    folder = request.getfixturevalue(name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    runs = {device: RunFolder(tmp_path / device) for device in ("cpu", "cuda")}
    for device, run in runs.items():
        config = CollectConfig(
            model=str(folder),
            prompts=prompts if name == "tiny_sd" else None,
            num_trajectories=6,
            num_steps=4,
            batch_size=4,
            device=device,
            dtype=dtype,  # type: ignore[arg-type]
        )
        assert collect.run(config, run).status == "done"
        assert collect_estimates.estimate(config, run).seconds > 0
        select.run(SelectConfig(strategy="uniform"), run)
    on_cpu, on_cuda = (latents_of(run.open("collect")) for run in runs.values())
    assert torch.equal(on_cpu[0], on_cuda[0])
    assert (on_cpu - on_cuda).norm() / on_cpu.norm() < BOUNDS[dtype]
    assert runs["cpu"].open("collect").identity == runs["cuda"].open("collect").identity

    model = load_model(str(folder), torch.device("cuda"), torch.float32)
    args, kwargs = CalibrationSet.load(runs["cuda"].open("select")).call([0, 5], "cuda", torch.float32)
    with torch.no_grad():
        output = model.denoiser(*args, **kwargs)[0]
    assert output.device.type == "cuda"
    assert output.isfinite().all()
