"""The records that commands return: the JSON object of `--json`, key by key.

The keys are part of the interface. Other tools rely on them, and they do not change silently.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from edadm_cli.artifacts.peak import peak_memory

if TYPE_CHECKING:
    from edadm_cli.artifacts.artifact import Artifact

Status = Literal["done", "up_to_date", "planned"]


class Record(BaseModel):
    """A part of a command's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Record):
    """The estimated cost of a stage, from a short probe."""

    seconds: float = Field(ge=0)
    memory_mib: float = Field(ge=0, description="peak on the device that computes, beyond the program itself")
    host_memory_mib: float | None = Field(None, ge=0, description="peak of the host where a GPU computes; else absent")
    disk_mib: float = Field(ge=0, description="the artifact, and what it needs while it is built")

    @model_serializer(mode="wrap")
    def _without_absent_host(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "host_memory_mib" or value is not None}


class StageRecord(Record):
    """The keys that every command returns; a planned stage returns only these, with its estimate."""

    command: str
    status: Status
    run: str | None = Field(None, description="the run folder")
    artifact: str | None = Field(None, description="the artifact's folder")
    identity: str | None = Field(None, description="the artifact's identity")
    seconds: float = Field(0.0, ge=0, description="wall-clock time of the command")
    peak_memory_mib: float | None = Field(None, description="most that the command's process had resident meanwhile")
    peak_cuda_memory_mib: float | None = Field(None, description="most on a GPU; null where none computed")
    warnings: tuple[str, ...] = ()
    estimate: Estimate | None = Field(None, description="with status 'planned' only")

    @model_serializer(mode="wrap")
    def _without_empty_estimate(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.estimate is None:
            fields.pop("estimate", None)
        return fields


def shared_keys(
    run: Path, artifact: Artifact, *, up_to_date: bool, started: float, warnings: Iterable[str]
) -> dict[str, Any]:
    """Returns the keys of a record that every stage fills in the same way.

    Args:
        run: The run folder.
        artifact: The artifact that the stage built or found.
        up_to_date: Whether the artifact existed already.
        started: `time.monotonic()` when the stage began.
        warnings: The warnings of the stage.
    """
    return {
        "status": "up_to_date" if up_to_date else "done",
        "run": str(run),
        "artifact": str(artifact.path),
        "identity": artifact.identity,
        "warnings": tuple(warnings),
        **spent(started),
    }


def spent(started: float) -> dict[str, Any]:
    """Returns the keys about the cost of the command: `seconds`, `peak_memory_mib`, `peak_cuda_memory_mib`.

    Args:
        started: `time.monotonic()` when the command began.
    """
    return {"seconds": time.monotonic() - started, **peak_memory()}


class CollectRecord(StageRecord):
    """Full-precision trajectories."""

    command: str = "collect"
    model: str
    num_steps: int
    num_trajectories: int


class SelectRecord(StageRecord):
    """A calibration set."""

    command: str = "select"
    strategy: str
    counts: tuple[int, ...] = Field(description="samples taken at each step; they sum to the set's size")
    density_radius: float | None = Field(description="r of TDAC; null for strategies without one")
    variety_weight: float | None = Field(description="lambda of TDAC; null for strategies without one")
    total_variation: float | None = Field(
        None, description="how far the counts are from equal ones: half the sum of |n_i / N - 1 / T|"
    )
    further_counts: dict[str, tuple[int, ...]] = Field(
        {}, description="further denoiser, such as transformer_2 -> samples taken at each of its steps"
    )


class Coverage(Record):
    """The numbers of layers that were planned, that were quantized, and that the recipe leaves in float."""

    planned: int
    quantized: int
    kept: int


class Loss(Record):
    """Reconstruction loss, summed over the units; null where nothing is learned."""

    first: float | None = Field(None, description="with weights rounded to nearest")
    last: float | None = Field(None, description="with the rounding that is deployed")
    soft: float | None = Field(None, description="at the end of learning, before h is rounded to 0 or 1")
    undecided: float | None = Field(None, description="share of the learned weights with 0.05 < h < 0.95 at that time")


class ReconstructRecord(StageRecord):
    """Quantization parameters."""

    command: str = "reconstruct"
    bits: str
    recipe: str
    units: int
    coverage: Coverage
    loss: Loss


class SensitivityRecord(StageRecord):
    """The error of each layer at each number of bits."""

    command: str = "sensitivity"
    layers: int = Field(description="layers that were measured")
    most_sensitive: dict[str, float] = Field(
        description="the ten most sensitive layers at the fewest weight bits -> the error that each causes alone"
    )


class Parity(Record):
    """An export against the stage before it."""

    images_bit_equal: bool
    latent_max_abs: float
    integer_rel_l2: float | None = Field(
        None, description="integer arithmetic against quantize-dequantize: the largest error of a layer"
    )
    integer_bound: float | None = Field(None, description="what that error must not exceed")
    integer_layer: str | None = Field(None, description="the layer with that error")
    integer_latent_rel_l2: float | None = Field(None, description="the same comparison of the final latents")


class EngineFiles(Record):
    """Files from which an engine loads an export without converting it."""

    name: str
    artifact: str
    identity: str
    size_mib: float


class TextEncoder(Record):
    """A text encoder whose weights an export holds in 8 bits, and what that changes."""

    bits: int
    layers: int = Field(ge=1, description="linear layers with such weights")
    size_mib: float = Field(ge=0, description="on disk, with its configuration")
    float_mib: float = Field(ge=0, description="its weights on disk in floating point")
    cosine: float | None = Field(None, description="similarity of its last states to those in float, mean over tokens")
    rel_l2: float | None = Field(None, description="relative L2 error of those states")


class PipelineSize(Record):
    """A whole pipeline, not its denoiser alone."""

    disk_mib: float = Field(ge=0, description="all files of all components")
    disk_before_mib: float = Field(ge=0, description="with the denoiser in float32 and text encoders as they were")
    memory_mib: float = Field(ge=0, description="all weights, loaded in float16")
    memory_before_mib: float = Field(ge=0, description="all weights of the full-precision pipeline in float16")


class CallTime(Record):
    """One call of the denoiser on the machine that made the export."""

    engine: str = Field(description="what edadm_cli.load chooses here")
    dtype: str = Field(description="element type of full precision, and of what the engine does not quantize")
    milliseconds: float = Field(gt=0, description="median on that engine")
    full_precision_milliseconds: float = Field(gt=0, description="median of torch in eager mode, in turns with it")
    calls: int = Field(ge=1, description="timed calls of each")
    factor: float = Field(gt=0, description="how many times as fast the export is")
    layers: dict[str, int] = Field({}, description="element type -> layers that this engine computes in it")
    attention: dict[str, int] = Field({}, description="element type -> attentions whose products are computed in it")


class ExportRecord(StageRecord):
    """A quantized pipeline."""

    command: str = "export"
    bits: str
    size_mib: dict[str, float] = Field(description="each component on disk, denoiser_fp32, and ratio")
    parity: Parity
    layers_by_width: dict[str, int] = Field({}, description="width such as w4a8, or float -> number of layers")
    verdict: tuple[str, ...] = Field((), description="the outcome in plain sentences")
    pipeline: PipelineSize | None = Field(None, description="size and memory; null in exports of earlier versions")
    text_encoders: dict[str, TextEncoder] = Field({}, description="those with 8-bit weights, by component")
    call_time: CallTime | None = Field(None, description="null where it was not measured")
    engine: EngineFiles | None = Field(None, description="the engine's files, where some were asked for")


class Metric(Record):
    """One metric of quality, with the features that it was computed in."""

    value: float
    features: str
    num_images: int


class Distance(Record):
    """Each image against the full-precision image of the same seed, on average.

    Paired metrics of other packages are further keys under their own names.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float]

    psnr_db: float = Field(description="equal images count as the largest finite value their size allows")
    latent_rel_l2: float
    ssim: float | None = Field(None, description="structural similarity of the pixels")
    perceptual_distance: float | None = Field(None, description="in the features of the other metrics")
    one_step_rel_l2: float | None = Field(
        None, description="error of single predictions on full-precision trajectories that were not learned from"
    )
    guided_one_step_rel_l2: float | None = Field(None, description="the same of the guided prediction")


class OneStepError(Record):
    """Relative L2 errors of single predictions, and of the trajectories that they add up to."""

    num_images: int = Field(ge=1)
    rel_l2: float = Field(description="over all steps")
    guided_rel_l2: float | None = Field(description="of the guided prediction; null without guidance in one call")
    by_step: tuple[float, ...]
    guided_by_step: tuple[float, ...]
    growth: tuple[float, ...] = Field(description="distance of the two pipelines' own trajectories before each step")


class EvaluateRecord(StageRecord):
    """Quality of an export."""

    command: str = "evaluate"
    bits: str
    metrics: dict[str, Metric]
    distance_to_full_precision: Distance
    full_precision: dict[str, Metric]
    skipped: dict[str, str] = Field({}, description="metrics that could not be computed, with the reason")
    verdict: tuple[str, ...] = Field((), description="the outcome in plain sentences")


class SampleRecord(StageRecord):
    """Images from an export."""

    command: str = "sample"
    images: tuple[str, ...]


class ReportRecord(StageRecord):
    """The page that shows a run."""

    command: str = "report"
    report: str


class RunRecord(StageRecord):
    """The whole chain: the record of each stage, by bit width where there are several."""

    command: str = "run"
    collect: StageRecord
    select: StageRecord
    results: dict[str, dict[str, StageRecord]] = Field(description="bit width -> stage -> record")
    report: str | None
