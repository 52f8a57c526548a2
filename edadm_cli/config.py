"""One frozen model a stage: a field is a command-line flag, a key of the TOML file, and a key of the manifest.

Fields marked `identity=False` say where or how fast a stage runs, not what it computes; they do not enter the
artifact's identity.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from edadm_cli.errors import UsageError
from edadm_cli.recipe import Recipe, SelectStrategy, without_later_defaults

MAX_IMAGES = 1_000_000
"""Images of one seed whose noise is their own (`edadm_cli/models/sampling.py`, `image_seed`)."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
DTypeName = Literal["float32", "bfloat16", "float16"]
_BITS = re.compile(r"^w([2-8])a([2-8])$")


def local(default: Any, **kwargs: Any) -> Any:
    """A field that is no part of an artifact's identity: a place, a device, a budget."""
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


class StageConfig(BaseModel):
    """What every stage takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in the stage")
    device: str = local("auto", description="cpu, cuda, cuda:N, or auto: cuda where there is one, else cpu")

    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON values, without the seed (the manifest names it itself)."""
        is_local = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False
        }
        return without_later_defaults(self, self.model_dump(mode="json", exclude=is_local | {"seed"}))


class CollectConfig(StageConfig):
    """Full-precision sampling: trajectories, conditioning, mid-block features."""

    model: str = local(description="known name, diffusers folder, hub id or checkpoint file", default=...)
    num_trajectories: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description="N, trajectories sampled; null: the model's own"
    )
    num_steps: int | None = Field(None, ge=1, description="T, sampler steps; null: the model's own")
    guidance_scale: float | None = Field(None, ge=0, description="classifier-free guidance; null: the model's own")
    batch_size: int | None = Field(
        None, ge=1, description="trajectories sampled together, one shard each; null: the model's own"
    )
    feature_batch: int | None = Field(
        None, ge=1, description="B, trajectories whose mid-block features are kept; null: the model's own"
    )
    dtype: DTypeName = Field("float32", description="arithmetic of the full-precision denoiser")
    prompts: Path | None = local(None, description="text file, one prompt a line; null: the model's own prompts")
    prediction_type: PredictionType | None = local(
        None, description="what the denoiser predicts; null: what the model's files say"
    )  # enters the identity as a field of the scheduler


class SelectConfig(StageConfig):
    """TDAC or another strategy: which step of each trajectory calibrates."""

    strategy: SelectStrategy = "tdac"
    num_samples: int | None = Field(None, ge=1, description="N of the calibration set; null: one a trajectory")
    density_radius: float | None = Field(None, gt=0, description="r; null: the median pairwise distance")
    variety_weight: float | None = Field(None, ge=0, description="lambda; null: the model's own")


class BitWidth(BaseModel):
    """Bits of weights and activations, written `w4a8`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: int = Field(ge=2, le=8)
    activation: int = Field(ge=2, le=8)

    @classmethod
    def parse(cls, text: str) -> BitWidth:
        """Read `wXaY`.

        Raises:
            UsageError: The text is not of that form, or X or Y is not within 2..8.
        """
        match = _BITS.match(text.strip().lower())
        if match is None:
            raise UsageError(
                f"--bits takes wXaY with X and Y from 2 to 8, such as w8a8 or w4a8; got '{text}'.",
                hint="edadm reconstruct --bits w4a8",
            )
        return cls(weight=int(match[1]), activation=int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


class ReconstructConfig(StageConfig):
    """Range search and fine-grained block reconstruction."""

    bits: BitWidth
    recipe: Recipe
    batch_size: int | None = Field(
        None, ge=1, description="calibration samples a forward of the denoiser; null: the model's own"
    )
    units: tuple[str, ...] = Field(
        (),
        description="shell patterns of the units that learn, the others keep their nearest rounding; none: all learn",
    )
    matmul: Literal["float32", "tf32"] = Field(
        "float32", description="how a GPU multiplies float32 numbers; tf32 rounds factors to 10 bits"
    )
    memory_budget_mib: int | None = local(
        None,
        ge=1,
        description="memory for cached unit inputs and targets, in MiB; what is beyond goes to disk;"
        " null: 4096 on a CPU, half of the free memory on a GPU",
    )

    def identity_fields(self) -> dict[str, Any]:
        """As for every stage; choices that are left at their defaults do not change the identity."""
        fields = super().identity_fields()
        plain = {"units": [], "matmul": "float32"}
        return {key: value for key, value in fields.items() if key not in plain or value != plain[key]}


class ExportConfig(StageConfig):
    """Packed integers in a diffusers folder, checked against the stage before."""

    bits: BitWidth
    parity_samples: int = Field(
        2, ge=1, le=MAX_IMAGES, description="images sampled before and after packing and compared"
    )
    engine: str | None = local(None, description="engine whose files are written besides, as an artifact of their own")


class EngineStageConfig(StageConfig):
    """What stages take that run an export, in torch or on an engine."""

    bits: BitWidth
    engine: str | None = Field(None, description="engine that runs the denoiser; null: torch, in floating point")

    def identity_fields(self) -> dict[str, Any]:
        """As for every stage; artifacts that no engine took part in keep the identity that they always had."""
        fields = super().identity_fields()
        return fields if self.engine is not None else {key: fields[key] for key in fields if key != "engine"}


class EvaluateConfig(EngineStageConfig):
    """Quality against real images and against the full-precision images of the same seeds."""

    @property
    def name(self) -> str:
        """The artifact's name: the bit width, with the engine where there is one."""
        return str(self.bits) if self.engine is None else f"{self.bits}-{self.engine}"

    num_images: int = Field(1000, ge=2, le=MAX_IMAGES, description="images sampled at each precision")
    batch_size: int = Field(50, ge=1, description="images sampled together")
    num_steps: int | None = Field(None, ge=1, description="sampler steps; null: as collected")
    guidance_scale: float | None = Field(None, ge=0, description="guidance; null: as collected")
    prompts: Path | None = local(None, description="text file, one prompt a line; null: the model's own prompts")
    real: str | None = local(
        None, description="folder of real images, npz of statistics or named dataset; null: the model's own"
    )
    metrics: tuple[str, ...] = Field((), description="figures to compute; none named: all that can be had here")
    clip_model: str = Field("ViT-L-14", description="open_clip model of the CLIP score")
    clip_pretrained: str = Field("openai", description="open_clip tag, or a file of weights")
    inception_weights: Path | None = local(None, description="file of Inception weights; null: torch-fidelity's own")


class SampleConfig(EngineStageConfig):
    """Images from an export."""

    num_images: int = Field(16, ge=1, le=MAX_IMAGES)
    batch_size: int = Field(16, ge=1)
    num_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    prompt: tuple[str, ...] = ()
    arithmetic: Literal["fake-quantize", "integer"] = Field(
        "fake-quantize", description="dequantize in floating point, or int8 products with int32 sums"
    )


class BenchConfig(StageConfig):
    """Speed, size and memory of a quantized denoiser against full precision."""

    bits: tuple[BitWidth, ...] = Field(min_length=1, description="bit widths measured side by side")
    model: str | None = local(None, description="known model measured without an export, its weights to nearest")
    engine: str | None = Field(None, description="engine of the quantized denoiser; null: the device's own")
    dtype: DTypeName | None = Field(
        None, description="element type of what is not quantized; null: the fastest that the device has units for"
    )
    recipe: Recipe | None = Field(None, description="with model: which layers; their ranges are min-max; null: default")
    batch_sizes: tuple[PositiveInt, ...] = Field(
        (1,), min_length=1, description="rows of a denoiser call; latency is that of the first, throughput of all"
    )
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width of the latents; null: the model's own"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; null: one a physical core")
    compiled: bool = Field(True, description="whether torch.compile is among the contenders")
    autotune: bool = Field(
        False, description="have torch.compile time kernels for every product: minutes, and perhaps a stronger opponent"
    )
    against: tuple[Literal["nncf", "torchao"], ...] = Field((), description="quantized by other tools, where installed")
    pipeline: bool = Field(False, description="whether whole images are timed too, with the model's own steps")
    rounds: int = local(10, ge=1, description="turns of each contender; their order is rotated from round to round")
