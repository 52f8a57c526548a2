"""Every architecture of the registry, small and with random weights, through the chain from collect to export."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.export import stage as export
from edadm_cli.models import loading
from edadm_cli.models.architecture import known_architectures
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import load_collected_model
from edadm_cli.models.sampling import sample, takes_prompts
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.select import stage as select
from tests.unit.models.tiny import shrunk

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
BITS = BitWidth.parse("w8a8")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_architecture", shrunk)


def chain(name: str, root: Path) -> tuple[RunFolder, Any]:
    run = RunFolder(root)
    steps = 2 if name == "flux-schnell" else 3
    collect.run(
        CollectConfig(model=f"{name}-random", num_trajectories=2, num_steps=steps, batch_size=2, device="cpu"), run
    )
    select.run(SelectConfig(device="cpu"), run)
    recipe = load_recipe("paper")
    learn = recipe.learn.model_copy(update={"iterations": 2, "batch_size": 2})
    ranges = recipe.ranges.model_copy(update={"num_candidates": 4})
    quick = recipe.model_copy(update={"learn": learn, "ranges": ranges})
    return run, reconstruct.run(ReconstructConfig(bits=BITS, recipe=quick, device="cpu", batch_size=2), run)


@pytest.mark.parametrize("name", known_architectures())
def test_an_architecture_goes_through_the_chain(name: str, tmp_path: Path) -> None:
    run, record = chain(name, tmp_path / "run")
    manifest = run.open("collect").manifest
    assert manifest.model.id == f"{name}-random"
    features = run.open("collect").tensors("features.safetensors")["features"]
    assert features.shape[1] >= 2
    assert bool((features[0] - features[-1]).abs().max() > 0), "the features tell the steps apart"

    assert record.coverage.planned == record.coverage.quantized > 10
    plan = run.open("reconstruct", str(BITS)).json("plan.json")
    model = load_collected_model(run, CPU, torch.float32)
    kinds = [unit["kind"] for unit in run.open("reconstruct", str(BITS)).json("units.json")["units"]]
    blocks = sum(len(getattr(model.denoiser, name, ())) for name in ("transformer_blocks", "single_transformer_blocks"))
    assert kinds.count("transformer") == blocks or model.denoiser_name == "unet" or name == "ldm-imagenet"
    layers = [n for n, m in model.denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert sorted(layers) == sorted({*plan["layers"], *plan["kept"]} & set(layers)), "every layer is accounted for"
    attentions = [n for n, m in model.denoiser.named_modules() if "Attention" in type(m).__name__]
    assert all(n in plan["attentions"] or n in plan["kept"] for n in attentions)

    done = export.run(ExportConfig(bits=BITS, device="cpu", parity_samples=1), run)
    assert done.parity.images_bit_equal
    folder = run.open("export", str(BITS)).path
    loaded = loading.load_model(str(folder), CPU, torch.float32, model.entry)
    assert len(quantized_layers(loaded.denoiser)) >= len(plan["layers"])
    assert type(loaded.denoiser) is type(model.denoiser)
    plain = dataclasses.replace(loaded, pipeline=DiffusionPipeline.from_pretrained(folder))
    plain.pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(*(images(each, model.entry.guidance_scale) for each in (plain, loaded)))


def images(model: loading.LoadedModel, guidance_scale: float | None) -> torch.Tensor:
    prompts = ["a cat"] if takes_prompts(model.pipeline) else None
    return sample(model, seeds=[4], prompts=prompts, num_steps=2, guidance_scale=guidance_scale).images


def test_flux_attention_products_are_said_to_be_kept(tmp_path: Path) -> None:
    run, _ = chain("flux-schnell", tmp_path / "run")
    kept = run.open("reconstruct", str(BITS)).json("plan.json")["kept"]
    reasons = {name: reason for name, reason in kept.items() if name.endswith(".attn")}
    assert len(reasons) == 4
    assert all("FluxAttnProcessor" in reason for reason in reasons.values())


def test_guidance_that_is_embedded_is_part_of_the_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = dict(shrunk("flux-schnell").components)
    cls, transformer = components["transformer"]
    components["transformer"] = (cls, {**transformer, "guidance_embeds": True})
    embedded = shrunk("flux-schnell").model_copy(update={"components": components})
    monkeypatch.setattr(loading, "load_architecture", lambda name: embedded)
    run = RunFolder(tmp_path / "run")
    fields: dict[str, Any] = {"model": "flux-schnell-random", "num_trajectories": 2, "num_steps": 2, "device": "cpu"}
    collect.run(CollectConfig(**fields, guidance_scale=3.5), run)
    select.run(SelectConfig(device="cpu"), run)
    calibration = CalibrationSet.load(run.open("select"))
    assert calibration.branches == 1
    assert calibration.condition["guidance"].tolist() == [3.5, 3.5]
    assert set(calibration.constants) == {"img_ids", "txt_ids"}
    args, kwargs = calibration.call(range(2), CPU, torch.float32)
    model = load_collected_model(run, CPU, torch.float32)
    with torch.no_grad():
        guided = model.denoiser(*args, **kwargs)[0]
        other = model.denoiser(*args, **{**kwargs, "guidance": torch.full((2,), 9.0)})[0]
    assert not torch.allclose(guided, other)


FRESH = """
import sys
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
layers = sum(type(module).__name__ == "QuantizedLayer" for module in denoiser.modules())
print(type(pipeline).__name__, type(denoiser).__name__, type(pipeline.scheduler).__name__, layers)
pipeline.save_pretrained(sys.argv[2])
again = DiffusionPipeline.from_pretrained(sys.argv[2])
same = (getattr(again, "unet", None) or again.transformer).state_dict()
assert all(torch.equal(tensor, same[name]) for name, tensor in denoiser.state_dict().items())
"""


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("ddpm-cifar10", "DDPMPipeline UNet2DModel QuadraticDDIMScheduler"),
        ("ldm-church", "LDMPipeline FixedHeadsUNet DDIMScheduler"),
        ("ldm-imagenet", "DiTPipeline ClassConditionalUNet DDIMScheduler"),
    ],
)
def test_components_of_ours_are_found_by_a_fresh_interpreter(name: str, classes: str, tmp_path: Path) -> None:
    run, _ = chain(name, tmp_path / "run")
    export.run(ExportConfig(bits=BITS, device="cpu", parity_samples=1), run)
    folder = run.open("export", str(BITS)).path
    program = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "again")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    *found, layers = done.stdout.split()
    assert " ".join(found) == classes
    assert int(layers) > 10
