"""The models that are known by name, with the settings that are theirs rather than the tool's.

References:
    EDA-DM, arXiv 2401.04585, section 5 and appendix (systems and hyper-parameters).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperSettings(_Frozen):
    """What the authors' scripts set for a system."""

    iterations: int = Field(description="optimizer steps a unit")
    batch_size: int = Field(description="calibration samples an optimizer step")
    layer_loss_weight: float = Field(description="gamma")
    learning_rates: dict[str, tuple[float, float]] = Field(
        description="bit width -> step of the rounding variables, step of the activation scales"
    )


class ModelEntry(_Frozen):
    """A model and its own defaults."""

    name: str
    description: str = ""
    source: Literal["shipped", "hub", "folder"]
    location: str = Field(description="name of a shipped model, hub id, or folder")
    revision: str | None = Field(None, description="hub revision; null: the newest")
    denoiser: str = Field(description="class of the denoiser")
    sampler: str = Field(description="what samples, for people to read")
    pipeline_class: str | None = Field(None, description="pipeline to use instead of the model's own")
    scheduler_class: str | None = Field(None, description="scheduler to use instead of the model's own")
    scheduler_config: dict[str, Any] = Field(default_factory=dict, description="fields that differ from the model's")
    num_steps: int = Field(ge=1)
    guidance_scale: float | None = Field(None, description="null: the pipeline knows no guidance")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's eta: share of fresh noise a step")
    num_trajectories: int = Field(256, ge=1, description="N")
    batch_size: int = Field(32, ge=1, description="trajectories sampled together")
    feature_batch: int = Field(64, ge=1, description="B, trajectories whose mid-block features are kept")
    variety_weight: float = Field(1.0, ge=0, description="lambda of TDAC")
    density_radius: float | None = Field(None, description="the paper's r; used only when given as a flag")
    prompts: Literal["digits"] | None = Field(None, description="where prompts come from when none are given")
    features: Literal["digits", "inception"] = Field("inception", description="features of the quality metrics")
    image_size: int | None = Field(None, description="pixels a side")
    paper: PaperSettings | None = None


@cache
def known_models() -> dict[str, ModelEntry]:
    """Every model with a name of its own, by name, in the order in which they are listed."""
    entries = (_DIGITS_SD, _DIGITS_DDPM, _DDPM_CIFAR10, _stable_diffusion("1.4"), _stable_diffusion("1.5"))
    return {entry.name: entry for entry in entries}


_DIGITS_SD = ModelEntry(
    name="digits-sd",
    description="Stable Diffusion in small: handwritten digits from a prompt, 32x32, shipped here",
    source="shipped",
    location="digits-sd",
    denoiser="UNet2DConditionModel",
    sampler="PNDM, 20 steps",
    num_steps=20,
    guidance_scale=2.0,
    num_trajectories=256,
    batch_size=64,
    feature_batch=64,
    prompts="digits",
    features="digits",
    image_size=32,
)

_DIGITS_DDPM = ModelEntry(
    name="digits-ddpm",
    description="handwritten digits in pixel space, unconditional, 16x16, shipped here",
    source="shipped",
    location="digits-ddpm",
    denoiser="UNet2DModel",
    sampler="DDIM, 20 steps, eta 0",
    num_steps=20,
    num_trajectories=256,
    batch_size=64,
    feature_batch=64,
    features="digits",
    image_size=16,
)

_DDPM_CIFAR10 = ModelEntry(
    name="ddpm-cifar10",
    description="DDIM on CIFAR-10, unconditional, 32x32: the paper's first system",
    source="hub",
    location="google/ddpm-cifar10-32",
    denoiser="UNet2DModel",
    sampler="DDIM, 100 steps, eta 0, uniform spacing (the paper's is quadratic)",
    pipeline_class="DDIMPipeline",
    scheduler_class="DDIMScheduler",
    scheduler_config={"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"},
    num_steps=100,
    num_trajectories=1024,
    batch_size=64,
    feature_batch=256,
    variety_weight=1.2,
    density_radius=3.0,
    image_size=32,
    paper=PaperSettings(
        iterations=5000,
        batch_size=32,
        layer_loss_weight=0.8,
        learning_rates={"w4a8": (5e-1, 5e-4), "w8a8": (5e-2, 1e-3)},
    ),
)


def _stable_diffusion(version: str) -> ModelEntry:
    location = {
        "1.4": "CompVis/stable-diffusion-v1-4",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    }[version]
    return ModelEntry(
        name="sd" + version.replace(".", ""),
        description=f"Stable Diffusion {version}, 512x512, from a prompt: the paper's fifth system",
        source="hub",
        location=location,
        denoiser="UNet2DConditionModel",
        sampler="PNDM (PLMS), 50 steps",
        num_steps=50,
        guidance_scale=7.5,
        num_trajectories=256,
        batch_size=4,
        feature_batch=8,
        variety_weight=5.0,
        density_radius=0.3,
        image_size=512,
        paper=PaperSettings(
            iterations=1000,
            batch_size=2,
            layer_loss_weight=0.8,
            learning_rates={"w4a8": (3e-2, 1e-4), "w8a8": (5e-4, 1e-4)},
        ),
    )
