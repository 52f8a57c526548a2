"""The models that are known by name, with their own default settings.

References:
    EDA-DM, arXiv 2401.04585, section 5 and appendix (systems and hyper-parameters).
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

REGISTRY = Path(__file__).with_name("registry.toml")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperSettings(_Frozen):
    """The settings in the authors' scripts for a system."""

    iterations: int = Field(description="optimizer steps per unit")
    batch_size: int = Field(description="calibration samples per optimizer step")
    layer_loss_weight: float = Field(description="gamma, the weight of the layers' loss in that of a unit")
    learning_rates: dict[str, tuple[float, float]] = Field(
        description="bit width -> step of the rounding variables, step of the activation scales"
    )


class ModelEntry(_Frozen):
    """A model and its defaults."""

    name: str
    description: str = ""
    source: Literal["shipped", "hub", "compvis", "assembled", "folder", "file", "random"] = Field(
        description="compvis: a checkpoint that is fetched by hand; assembled: a folder that is made by hand"
    )
    location: str = Field(description="shipped model, hub id, path, or architecture")
    revision: str | None = Field(None, description="hub revision; null: the newest")
    architecture: str | None = Field(None, description="shipped architecture, to build it without its weights")
    weights_seed: int = Field(0, description="seed of random weights")
    denoiser: str = Field(description="class of the denoiser")
    sampler: str = Field(description="name of the sampler and its number of steps, for people to read")
    pipeline_class: str | None = Field(None, description="pipeline to use instead of the model's own")
    scheduler_class: str | None = Field(None, description="scheduler to use instead of the model's own")
    scheduler_config: dict[str, Any] = Field(default_factory=dict, description="fields that differ from the model's")
    call_arguments: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the pipeline's call, such as num_frames"
    )
    images: str | None = Field(None, description="folder of the images that condition the pipeline")
    num_steps: int = Field(ge=1)
    guidance_scale: float | None = Field(None, description="null: the pipeline has no guidance")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's eta: share of fresh noise per step")
    num_trajectories: int = Field(256, ge=1, description="N, the number of trajectories")
    batch_size: int = Field(32, ge=1, description="trajectories sampled together")
    feature_batch: int = Field(64, ge=1, description="B, the trajectories whose mid-block features are stored")
    variety_weight: float = Field(1.0, ge=0, description="lambda, the weight of the variety in TDAC")
    density_radius: float | None = Field(
        None, description="r, the paper's radius of the density, which the recipe `paper` takes"
    )
    prompts: Literal["digits", "emoji"] | None = Field(None, description="source of the prompts when none are given")
    features: Literal["digits", "emoji", "inception"] = Field("inception", description="features of the metrics")
    image_size: int | None = Field(None, description="pixels per side")
    paper: PaperSettings | None = None


@cache
def known_models() -> dict[str, ModelEntry]:
    """Returns the known models by name, in the order of the list that `edadm models` prints."""
    with REGISTRY.open("rb") as file:
        rows = tomllib.load(file)
    entries = {name: ModelEntry(name=name, **row) for name, row in rows.items()}
    randoms = [_with_random_weights(entry) for entry in entries.values() if entry.architecture is not None]
    return entries | {entry.name: entry for entry in randoms}


def _with_random_weights(entry: ModelEntry) -> ModelEntry:
    change = {
        "name": f"{entry.name}-random",
        "description": f"the architecture of {entry.name} with seeded random weights, built offline",
        "source": "random",
        "location": entry.architecture,
        "revision": None,
    }
    return entry.model_copy(update=change)
