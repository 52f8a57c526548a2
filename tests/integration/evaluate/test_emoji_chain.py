"""The chain on the shipped emoji models, UNet and transformer: from trajectories to metrics in their own features."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, EvaluateConfig, ExportConfig, ReconstructConfig, SelectConfig
from edadm_cli.evaluate import stage as evaluate
from edadm_cli.export import stage as export
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.select import stage as select

METRICS = ("frechet_distance", "prompt_accuracy", "prompt_among_five", "ssim", "perceptual_distance")
BITS = BitWidth.parse("w4a8")


@pytest.mark.parametrize("model", ["emoji-sd", "emoji-dit"])
def test_an_emoji_model_goes_through_every_stage(model: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / model)
    collect.run(CollectConfig(model=model, num_trajectories=2, num_steps=1, device="cpu"), run)
    select.run(SelectConfig(strategy="uniform", device="cpu"), run)
    recipe = load_recipe("rtn")
    learned = reconstruct.run(ReconstructConfig(bits=BITS, recipe=recipe, device="cpu"), run)
    assert learned.coverage.quantized == learned.coverage.planned > 0
    exported = export.run(ExportConfig(bits=BITS, device="cpu", parity_samples=1, measure=False), run)
    assert exported.parity.images_bit_equal
    shared = "vae/diffusion_pytorch_model.safetensors"
    assert (run.open("export", "w4a8").path / shared).is_file(), "the export holds the shared parts itself"
    judged = evaluate.run(EvaluateConfig(bits=BITS, num_images=2, metrics=METRICS, device="cpu"), run)
    assert {metric.features.partition("/")[0] for metric in judged.metrics.values()} == {"emoji"}
    distances = judged.distance_to_full_precision
    assert 0 < distances.latent_rel_l2 < 1
    with Image.open(run.open("evaluate", "w4a8").path / "grid.png") as grid:
        assert grid.mode == "RGB"
        assert grid.width >= 128
