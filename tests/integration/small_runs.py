"""Small runs: a configuration file of the whole chain, an export of a loaded pipeline, a prediction of its denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.export.folder import write_pipeline
from edadm_cli.integrations.quantizer import EdadmConfig
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.quant.plan import format_version
from edadm_cli.recipe import load_recipe

CPU = torch.device("cpu")


def export(model: LoadedModel, folder: Path) -> Path:
    """Writes a pipeline whose denoiser is rounded to nearest at W4A8, attention included, and returns the folder."""
    recipe = load_recipe("paper")
    recipe = recipe.model_copy(update={"ranges": recipe.ranges.model_copy(update={"num_candidates": 4})})
    call = example_call(model.denoiser, batch_size=2)
    plan = quantize_to_nearest(model.denoiser, recipe, BitWidth.parse("w4a8"), [call])
    assert plan.attentions
    config = EdadmConfig(format_version(plan), "w4a8", "paper", plan.model_dump(mode="json"))
    write_pipeline(model, folder, {model.denoiser_name: config.to_dict()})
    return folder


def predict(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the prediction of a tiny Stable Diffusion UNet for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    with torch.no_grad():
        output: Tensor = unet(x.to(dtype), torch.tensor(7), states.to(dtype)).sample
    return output


def run_config(num_trajectories: int) -> str:
    """Returns a configuration for `edadm run` with three steps and four images; the recipe is `recipe.toml`."""
    return f"""
device = "cpu"
[collect]
num_trajectories = {num_trajectories}
num_steps = 3
batch_size = 2
[reconstruct]
recipe = "recipe.toml"
[export]
parity_samples = 1
[evaluate]
num_images = 4
batch_size = 2
"""
