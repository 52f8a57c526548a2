"""A run folder as `collect` and `export` leave it, with a tiny model in the place of the shipped one.

The export is the full-precision pipeline with noise on the denoiser's weights: what is tested is how it is
compared, not how it was quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edadm_cli.artifacts import Artifact, BuildSpec, ExportFacts, Parity, RunFolder, load_tensors, save_tensors
from edadm_cli.collect import stage as collect_stage
from edadm_cli.config import CollectConfig
from edadm_cli.evaluate.real import RealImages
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.models.digits import data as digits
from edadm_cli.models.digits.classifier import DigitClassifier
from edadm_cli.models.registry import ModelEntry

BITS = "w4a8"
Exporter = Callable[[RunFolder, float], Artifact]


def _digits_entry(name: str, prompts: bool, image_size: int) -> ModelEntry:
    return ModelEntry(
        name=name,
        source="shipped",
        location=name,
        denoiser="UNet",
        sampler="as it is",
        num_steps=2,
        guidance_scale=2.0 if prompts else None,
        prompts="digits" if prompts else None,
        features="digits",
        image_size=image_size,
    )


@pytest.fixture
def tiny_models(tiny_sd: Path, tiny_ddpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny pipelines known by name as digits models, and give them real images and a classifier."""
    folders = {"tiny-digits-sd": tiny_sd, "tiny-digits-ddpm": tiny_ddpm}
    entries = {
        "tiny-digits-sd": _digits_entry("tiny-digits-sd", True, 16),
        "tiny-digits-ddpm": _digits_entry("tiny-digits-ddpm", False, 8),
    }
    shipped = digits.model_folder
    monkeypatch.setattr(digits, "model_folder", lambda name, *rest: folders.get(name) or shipped(name, *rest))
    for module in ("loading", "sources.locating"):
        monkeypatch.setattr(f"edadm_cli.models.{module}.known_models", lambda: entries)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        classifier = DigitClassifier().eval().requires_grad_(False)
    monkeypatch.setattr("edadm_cli.evaluate.features.load_classifier", lambda device="cpu": classifier)
    images = torch.randint(0, 256, (40, 1, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    real = RealImages("random images", "0" * 64, lambda size: ArrayImages(images))
    monkeypatch.setattr("edadm_cli.evaluate.spaces.shipped_digits", lambda image_size: real)


def collected(root: Path, model: str) -> RunFolder:
    """Collect two trajectories of a model into a new run."""
    run = RunFolder(root)
    collect_stage.run(CollectConfig(model=model, num_trajectories=2, num_steps=2, batch_size=2), run)
    return run


@pytest.fixture
def export_noisy() -> Exporter:
    """Return a function that writes an `export` artifact: the model with relative noise on its denoiser."""

    def export(run: RunFolder, noise: float) -> Artifact:
        collect = run.open("collect")
        model = collect.manifest.model.id
        source = Path(model) if Path(model).is_dir() else digits.model_folder(model)
        plan = BuildSpec("export", BITS, {"noise": noise}, 0, (collect,), collect.manifest.model)
        with run.build(plan, force=True) as build:
            shutil.copytree(source, build.path, dirs_exist_ok=True)
            path = build.path / "unet" / "diffusion_pytorch_model.safetensors"
            generator = torch.Generator().manual_seed(3)
            save_tensors(
                path,
                {
                    name: tensor * (1 + noise * torch.randn(tensor.shape, generator=generator))
                    for name, tensor in load_tensors(path).items()
                },
            )
            sizes = {"unet": 1.0, "denoiser_fp32": 4.0, "ratio": 4.0}
            parity = Parity(images_bit_equal=True, latent_max_abs=0.0)
            ExportFacts(denoiser="unet", size_mib=sizes, parity=parity).save(build.path)
            return build.commit()

    return export


@pytest.fixture
def text_run(tmp_path: Path, tiny_models: None, export_noisy: Exporter) -> RunFolder:
    """A run of the text-to-image model with a slightly noisy export."""
    run = collected(tmp_path / "text", "tiny-digits-sd")
    export_noisy(run, 0.05)
    return run


@pytest.fixture
def pixel_run(tmp_path: Path, tiny_models: None, export_noisy: Exporter) -> RunFolder:
    """A run of the unconditional model with a slightly noisy export."""
    run = collected(tmp_path / "pixel", "tiny-digits-ddpm")
    export_noisy(run, 0.05)
    return run
