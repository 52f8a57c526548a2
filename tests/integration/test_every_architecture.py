"""Every architecture of the registry, small and with random weights, through the chain from collect to export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.export import stage as export
from edadm_cli.models import loading
from edadm_cli.models.architecture import Architecture
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.parameters import takes_guidance, takes_prompts
from edadm_cli.models.sources import locating, stored_denoiser
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.select import stage as select
from tests.denoisers import table
from tests.integration.fresh_interpreter import FreshInterpreter, image_digest
from tests.unit.models.tiny import FLUX_SAMPLE_SIZE, SHRUNK, shrink_flux, shrunk

CPU = torch.device("cpu")
BITS = BitWidth.parse("w8a8")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_architectures(shrunk, monkeypatch)
    shrink_flux(monkeypatch)


def use_architectures(load: Callable[[str], Architecture], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loading, locating, stored_denoiser):
        monkeypatch.setattr(module, "load_architecture", load)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """How many threads share a sum changes its last bits; the fresh interpreter has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chain(name: str, root: Path, images: Path | None = None) -> RunFolder:
    run = RunFolder(root)
    steps = 2 if name == "flux-schnell" else 3
    config = CollectConfig(model=f"{name}-random", num_trajectories=2, num_steps=steps, batch_size=2, device="cpu")
    collect.run(config.model_copy(update={"images": images}), run)
    select.run(SelectConfig(device="cpu"), run)
    recipe = load_recipe("paper")
    learn = recipe.learn.model_copy(update={"iterations": 2, "batch_size": 2})
    ranges = recipe.ranges.model_copy(update={"num_candidates": 4})
    quick = recipe.model_copy(update={"learn": learn, "ranges": ranges})
    record = reconstruct.run(ReconstructConfig(bits=BITS, recipe=quick, device="cpu", batch_size=2), run)
    assert record.coverage.planned == record.coverage.quantized > 10
    exporting = ExportConfig(bits=BITS, device="cpu", parity_samples=1, measure=False)
    assert export.run(exporting, run).parity.images_bit_equal
    return run


@pytest.mark.parametrize("name", [name for name in SHRUNK if name != "sd15-inpaint"])
def test_an_architecture_goes_through_the_chain_and_round_trips(
    name: str, fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    run = chain(name, tmp_path / "run")
    assert run.open("collect").manifest.model.id == f"{name}-random"
    features = run.open("collect").tensors("features.safetensors")["features"]
    assert features.shape[1] >= 2
    assert bool((features[0] - features[-1]).abs().max() > 0), "the features tell the steps apart"
    model = CollectedRun.open(run).load(CPU, torch.float32)
    units = run.open("reconstruct", str(BITS)).json("units.json")["units"]
    require_everything_is_planned(name, model, run.open("reconstruct", str(BITS)).json("plan.json"), units)
    folder = str(run.open("export", str(BITS)).path)
    ours = loading.load_model(folder, CPU, torch.float32, model.entry)
    assert type(ours.denoiser) is type(model.denoiser)
    arguments = arguments_of(ours)
    actual = fresh_interpreter.ask(folder=folder, again=str(tmp_path / "again"), arguments=arguments)
    require_round_trip(actual, ours, arguments)


def test_inpainting_goes_through_the_chain(tmp_path: Path) -> None:
    table.example_images(tmp_path / "images")
    run = chain("sd15-inpaint", tmp_path / "run", tmp_path / "images")
    model = CollectedRun.open(run).load(CPU, torch.float32)
    units = run.open("reconstruct", str(BITS)).json("units.json")["units"]
    require_everything_is_planned("sd15-inpaint", model, run.open("reconstruct", str(BITS)).json("plan.json"), units)


# Attention whose products stay in floating point: how many blocks, and the processor that is the reason.
KEPT_ATTENTION = {
    "flux-dev": (4, "FluxAttnProcessor"),
    "flux-schnell": (4, "FluxAttnProcessor"),
    "sd3.5-large": (3, "JointAttnProcessor2_0"),
    "sd3.5-medium": (4, "JointAttnProcessor2_0"),
}


def require_everything_is_planned(
    name: str, model: LoadedModel, plan: dict[str, Any], units: list[dict[str, Any]]
) -> None:
    """Every layer, block and attention of the denoiser is in the plan, or left in float with a reason."""
    groups = ("transformer_blocks", "single_transformer_blocks")
    blocks = sum(len(getattr(model.denoiser, group, ())) for group in groups)
    if model.denoiser_name == "transformer" and name != "ldm-imagenet":
        assert [unit["kind"] for unit in units].count("transformer") == blocks > 0
    modules = dict(model.denoiser.named_modules())
    layers = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert layers == {*plan["layers"], *plan["kept"]} & layers
    attentions = {n for n, m in modules.items() if "Attention" in type(m).__name__}
    assert attentions <= {*plan["attentions"], *plan["kept"]}
    count, reason = KEPT_ATTENTION.get(name, (0, ""))
    kept = [plan["kept"][n] for n in attentions if n in plan["kept"]]
    assert len(kept) == count
    assert all(reason in text for text in kept)


def arguments_of(model: LoadedModel) -> dict[str, Any]:
    """Returns what a call of the pipeline needs besides a seed."""
    arguments: dict[str, Any] = {"prompt": ["a cat"]} if takes_prompts(model.pipeline) else {}
    if type(model.pipeline).__name__ == "DiTPipeline":
        arguments["class_labels"] = [3]
    if takes_guidance(model.pipeline):
        arguments["guidance_scale"] = model.entry.guidance_scale
    if type(model.pipeline).__name__ == "FluxPipeline":
        arguments["height"] = arguments["width"] = FLUX_SAMPLE_SIZE * model.pipeline.vae_scale_factor
    return arguments


def require_round_trip(actual: dict[str, Any], ours: LoadedModel, arguments: dict[str, Any]) -> None:
    """A fresh interpreter generated the same image, also from what it saved, and a cast did not change the scales."""
    parts = (ours.pipeline, ours.denoiser, ours.pipeline.scheduler)
    assert actual["classes"] == [type(part).__name__ for part in parts]
    assert actual["layers"] == len(quantized_layers(ours.denoiser)) > 10
    assert actual["images"] == [image_digest(ours.pipeline, arguments)] * 2
    assert actual["scales"] > actual["layers"]
    assert actual["scales_kept"]
    assert (actual["scale_dtypes"], actual["dtypes"]) == (["torch.float32"], ["torch.bfloat16"])


def test_guidance_that_is_embedded_is_part_of_the_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = dict(shrunk("flux-schnell").components)
    cls, transformer = components["transformer"]
    components["transformer"] = (cls, {**transformer, "guidance_embeds": True})
    embedded = shrunk("flux-schnell").model_copy(update={"components": components})
    use_architectures(lambda name: embedded, monkeypatch)
    run = RunFolder(tmp_path / "run")
    fields: dict[str, Any] = {"model": "flux-schnell-random", "num_trajectories": 2, "num_steps": 2, "device": "cpu"}
    collect.run(CollectConfig(**fields, guidance_scale=3.5), run)
    select.run(SelectConfig(device="cpu"), run)
    calibration = CalibrationSet.load(run.open("select"))
    assert calibration.branches == 1
    assert calibration.condition["guidance"].tolist() == [3.5, 3.5]
    assert set(calibration.constants) == {"img_ids", "txt_ids"}
    args, kwargs = calibration.call(range(2), CPU, torch.float32)
    model = CollectedRun.open(run).load(CPU, torch.float32)
    with torch.no_grad():
        guided = model.denoiser(*args, **kwargs)[0]
        other = model.denoiser(*args, **{**kwargs, "guidance": torch.full((2,), 9.0)})[0]
    assert not torch.allclose(guided, other)
