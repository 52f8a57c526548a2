"""The configurations of the stages that quantize a model: one frozen pydantic model per stage.

Each field is a flag of the command line, a key of the TOML file, and a key of the manifest, and is written once. Its
description is the help text of the flag; `setting` gives the spelling of the flag and the role of the field in the
identity of an artifact. The stages that run an export have theirs in `engine_config`, which this module exports too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from edadm_cli.bits import LARGEST_GROUP, LARGEST_GROUPED_BITS, SMALLEST_GROUP, BitWidth
from edadm_cli.engine_config import BenchConfig, EngineStageConfig, EvaluateConfig, FeaturesName, SampleConfig
from edadm_cli.recipe import Recipe
from edadm_cli.stage_config import MAX_IMAGES, RECIPE_NAMES, SIZE_ARGUMENTS, DTypeName, StageConfig, Weights, setting

__all__ = [
    "EARLIER_DENSITY_QUANTILE",
    "LOCAL_DENSITY_QUANTILE",
    "MAX_IMAGES",
    "BenchConfig",
    "BitWidth",
    "CollectConfig",
    "DTypeName",
    "EngineStageConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FeaturesName",
    "PredictionType",
    "ReconstructConfig",
    "SampleConfig",
    "SelectConfig",
    "SensitivityConfig",
    "StageConfig",
]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
LOCAL_DENSITY_QUANTILE = 0.05
"""Share of the pairs of steps that are within the radius of density, if no radius is given."""
EARLIER_DENSITY_QUANTILE = 0.5
"""The quantile of a selection that records neither a radius nor a quantile, as version 0.1 wrote it."""


def _size(description: str) -> Any:
    return setting(None, description, identity="never", ge=1)  # enters the identity as an argument of the pipeline


class CollectConfig(StageConfig):
    """Settings of full-precision sampling: trajectories, conditioning, features of the middle block."""

    model: str = setting(
        ...,
        "Known name (edadm models), diffusers folder, hub id, or checkpoint file.",
        identity="never",
        metavar="MODEL",
    )
    num_trajectories: int | None = setting(
        None, "N, the number of trajectories that are sampled; by default the model's own.", ge=1, le=MAX_IMAGES
    )
    num_steps: int | None = setting(None, "T, the number of sampler steps; by default the model's own.", ge=1)
    guidance_scale: float | None = setting(None, "Scale of classifier-free guidance; by default the model's own.", ge=0)
    prompts: Path | None = setting(
        None,
        "File of prompts: a text with one per line, or .json, .csv or .tsv; by default the model's own prompts.",
        identity="never",
        metavar="FILE",
    )
    images: Path | None = setting(
        None,
        "Folder of the images that condition the pipeline; NAME.mask.png beside NAME.png is what is repainted.",
        identity="never",  # enters the identity by the hash of its files
        metavar="DIR",
    )
    height: int | None = _size("Height of the images or frames in pixels, with --width; by default the model's own.")
    width: int | None = _size("Width of the images or frames in pixels, with --height; by default the model's own.")
    num_frames: int | None = _size("Number of frames of a clip; by default the model's own.")
    dtype: DTypeName = setting(
        "float32",
        "Element type in which the full-precision denoiser computes: float32, the default, bfloat16 or float16.",
    )
    batch_size: int | None = setting(
        None, "Trajectories that are sampled together, one shard per batch; by default the model's own.", ge=1
    )
    feature_batch: int | None = setting(
        None, "B, the number of trajectories whose features are recorded; by default the model's own.", ge=1
    )
    weights: Weights = setting(
        "auto",
        "Where the weights are: memory; disk, which frees the text encoders once the prompts are encoded and reads each"
        " layer of the denoiser whenever it is used; or auto, the default, which chooses by the device's memory.",
        identity="never",
    )
    prediction_type: PredictionType | None = setting(
        None,
        "What the denoiser predicts: epsilon, v_prediction or sample; by default what the model's files say.",
        identity="never",  # enters the identity as a field of the scheduler
    )

    def sizes(self) -> dict[str, int]:
        """Returns the given sizes by the names of the pipeline's arguments."""
        given = {name: getattr(self, name) for name in SIZE_ARGUMENTS}
        return {name: value for name, value in given.items() if value is not None}


class SelectConfig(StageConfig):
    """Settings of the selection of calibration samples: TDAC or another strategy."""

    strategy: str = setting(
        "tdac",
        "How the samples are shared out over the sampler steps: tdac, uniform, normal, random, last, or a strategy of"
        " another package; by default the recipe's.",
        metavar="NAME",
    )
    num_samples: int | None = setting(
        None,
        "N, the number of samples in the calibration set; by default --samples-per-trajectory times the trajectories.",
        ge=1,
    )
    samples_per_trajectory: int = setting(
        1,
        "Steps that are taken from each trajectory, if no N is given; by default the recipe's.",
        identity="never",
        ge=1,
        le=1000,
    )
    density_radius: float | None = setting(
        None, "r of TDAC, the radius of the density; by default a low quantile of the pairwise distances.", gt=0
    )
    model_radius: bool = setting(
        False, "Take r from the model's published settings, if it has any.", identity="if_changed"
    )
    density_quantile: float | None = setting(
        None,
        "Share of the pairs of steps that are within r, if no r is given; 0.05 by default.",
        identity="if_changed",
        gt=0,
        le=1,
    )
    variety_weight: float | None = setting(
        None, "lambda of TDAC, the weight of the variety; by default the model's own.", ge=0
    )


class ReconstructConfig(StageConfig):
    """Settings of range search and fine-grained block reconstruction."""

    bits: BitWidth = setting(
        ...,
        "Bits of weights and activations, 2 to 8 each, such as w4a8; w4g32a8 has groups of 32 weights; auto:4.5a8,"
        " auto:4.25g32a8 or auto:1.8MiB after edadm sensitivity.",
        metavar="wXaY",
    )
    recipe: Recipe = setting(..., f"How layers are quantized: {RECIPE_NAMES}.", metavar="NAME|FILE")
    batch_size: int | None = setting(
        None, "Calibration samples per call of the denoiser; by default the model's own.", ge=1
    )
    units: tuple[str, ...] = setting(
        (),
        "Units that learn, such as 'mid_block.*'; the others are rounded to nearest; repeatable; by default all.",
        identity="if_changed",
        metavar="PATTERN",
    )
    matmul: Literal["float32", "tf32"] | None = setting(
        None,
        "How a GPU multiplies float32 numbers: tf32, the default, which rounds factors to 10 bits, or float32.",
        identity="if_changed",
    )
    weights: Weights = setting(
        "auto",
        "Where the float weights are: memory; disk, which reads each whenever it is used; or auto, the default, which"
        " chooses disk for a denoiser that would take more than 45% of the device's memory.",
        identity="never",
    )
    memory_budget_mib: int | None = setting(
        None,
        "Memory for cached inputs and targets of the units, in MiB, beyond which they go to disk; by default 4096 on a"
        " CPU, and on a GPU all available memory that learning a unit does not need.",
        identity="never",
        metavar="MIB",
        flags=("--memory-budget", "--memory-budget-mib"),
        ge=1,
    )

    @property
    def name(self) -> str:
        """The artifact's name."""
        return str(self.bits)


class SensitivityConfig(StageConfig):
    """Settings of the measurement of each layer's error at each number of bits."""

    recipe: Recipe = setting(
        ..., f"Which layers are measured, and how: the recipe {RECIPE_NAMES}.", metavar="NAME|FILE"
    )
    weight_bits: tuple[int, ...] = setting(
        (2, 3, 4, 6, 8),
        "Numbers of weight bits that are measured; 2,3,4,6,8 by default.",
        metavar="2,3,...",
        split=True,
    )
    activation_bits: tuple[int, ...] = setting(
        (4, 6, 8), "Numbers of activation bits that are measured; 4,6,8 by default.", metavar="4,6,...", split=True
    )
    group_size: int | None = setting(
        None,
        f"Also measure weights of at most {LARGEST_GROUPED_BITS} bits in groups of so many, for --bits auto:4.25g32a8.",
        ge=SMALLEST_GROUP,
        le=LARGEST_GROUP,
        identity="if_changed",
    )
    num_samples: int = setting(
        64, "Calibration samples by which the ranges of the layers' inputs are searched; 64 by default.", ge=1
    )
    num_images: int = setting(
        16,
        "Images whose final samples are followed back through all steps, to every layer; 16 by default.",
        ge=1,
        le=MAX_IMAGES,
    )
    batch_size: int | None = setting(
        None,
        "Samples per call of the denoiser, and at most so many images at a time; by default the model's own.",
        ge=1,
    )

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _are_widths(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if not bits or any(not 2 <= number <= 8 for number in bits):
            raise ValueError("numbers of bits are from 2 to 8")
        return tuple(sorted(set(bits)))

    @property
    def grouped_bits(self) -> tuple[int, ...]:
        """The numbers of weight bits that are measured in groups too."""
        return () if self.group_size is None else tuple(b for b in self.weight_bits if b <= LARGEST_GROUPED_BITS)


class ExportConfig(StageConfig):
    """Settings of the export: packed integers in a diffusers folder, compared with the reconstruction."""

    bits: BitWidth = setting(..., "Bit width, such as w4a8; by default the run's last one.", metavar="wXaY")
    parity_samples: int = setting(
        2, "Images that are sampled before and after packing and compared; 2 by default.", ge=1, le=MAX_IMAGES
    )
    engine: str | None = setting(
        None,
        "Also write the files of this engine (edadm engines lists them), as an artifact of their own.",
        identity="never",
        metavar="NAME",
    )
    lora: tuple[str, ...] = setting(
        (),
        "LoRA that is fused into the weights before they are packed, with the calibration unchanged; repeatable.",
        identity="never",  # enters the identity by the hash of the file and the weight
        metavar="FILE[:WEIGHT]",
    )
    text_encoders: Literal["float", "int8"] = setting(
        "float",
        "Text encoders of the export: float, the default, or int8, with 8-bit weights that torchao rounds to nearest.",
        identity="if_changed",
    )
    measure: bool = setting(
        True,
        "Whether the export and full precision are timed briefly on this machine, for the verdict; by default they"
        " are.",
        identity="never",
    )
    format: Literal["diffusers", "comfyui"] = setting(
        "diffusers",
        "Form of the export: diffusers, the default, or comfyui, which also writes the denoiser as one file for"
        " ComfyUI.",
        identity="never",
    )

    @property
    def name(self) -> str:
        """The artifact's name."""
        return str(self.bits)
