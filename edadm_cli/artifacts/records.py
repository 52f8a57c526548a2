"""What each command returns: the JSON object of `--json`, key by key.

Keys are part of the interface: tools outside rely on them, and they do not change silently.
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


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Record):
    """What a stage would cost, from a short probe."""

    seconds: float = Field(ge=0)
    memory_mib: float = Field(ge=0, description="peak, beyond the program itself")
    disk_mib: float = Field(ge=0, description="the artifact, and what it needs while it is built")


class StageRecord(_Record):
    """What every command returns; a planned stage returns just this, with its estimate."""

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
    """The keys of a record that every stage fills in the same way.

    Args:
        run: The run folder.
        artifact: What the stage built or found.
        up_to_date: Whether it found it.
        started: `time.monotonic()` when the stage began.
        warnings: What it warned of.
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
    """The keys of a record that say what the command took: `seconds`, `peak_memory_mib`, `peak_cuda_memory_mib`.

    Args:
        started: `time.monotonic()` when it began.
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


class Coverage(_Record):
    """How many layers were to be quantized, were quantized, and stay in floating point by the recipe."""

    planned: int
    quantized: int
    kept: int


class Loss(_Record):
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
    """What each layer costs at each number of bits."""

    command: str = "sensitivity"
    layers: int = Field(description="layers that were measured")
    most_sensitive: dict[str, float] = Field(
        description="the ten layers that hurt most with the fewest weight bits -> the error that each causes alone"
    )


class Parity(_Record):
    """An export against the stage before it."""

    images_bit_equal: bool
    latent_max_abs: float
    integer_rel_l2: float | None = Field(
        None, description="integer arithmetic against quantize-dequantize: the largest error of a layer"
    )
    integer_bound: float | None = Field(None, description="what that error must not exceed")
    integer_layer: str | None = Field(None, description="the layer with that error")
    integer_latent_rel_l2: float | None = Field(None, description="the same comparison of the final latents")


class EngineFiles(_Record):
    """Files from which an engine loads an export without converting it."""

    name: str
    artifact: str
    identity: str
    size_mib: float


class ExportRecord(StageRecord):
    """A quantized pipeline."""

    command: str = "export"
    bits: str
    size_mib: dict[str, float] = Field(description="each component on disk, denoiser_fp32, and ratio")
    parity: Parity
    layers_by_width: dict[str, int] = Field({}, description="width such as w4a8, or float -> number of layers")
    verdict: tuple[str, ...] = Field((), description="the outcome in plain sentences")
    engine: EngineFiles | None = Field(None, description="the engine's files, where some were asked for")


class Metric(_Record):
    """One metric of quality, with the features that it was computed in."""

    value: float
    features: str
    num_images: int


class Distance(_Record):
    """Each image against the full-precision image of the same seed, on average.

    Paired metrics of other packages stand here under their own names.
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


class OneStepError(_Record):
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


class Latency(_Record):
    """Time of one call of the denoiser over all samples, in milliseconds."""

    median: float
    min: float
    max: float
    num_samples: int


class PipelineTime(_Record):
    """Time of one whole image, in seconds; `denoiser_share` is the part spent in the denoiser."""

    seconds: float
    num_steps: int
    denoiser_share: float


class Contender(_Record):
    """One way to run the denoiser, as it was measured."""

    name: str
    engine: str = Field(description="torch, an engine, or another tool")
    dtype: str = Field(description="element type of what is not quantized")
    bits: str | None = Field(description="null: full precision")
    compiled: bool = Field(description="by torch.compile, or ahead of time by an engine")
    latency_ms: Latency
    peak_memory_mib: float | None = Field(description="while it runs; null where it was not measured alone")
    load_memory_mib: float | None = Field(description="while it is loaded and compiled")
    load_seconds: float = Field(description="loading and compiling, up to the end of the first call")
    size_mib: float = Field(description="of its weights or files on disk")
    throughput: dict[str, float] = Field(description="batch size -> rows a second")
    pipeline: PipelineTime | None = None


class EngineParity(_Record):
    """A quantized denoiser on an engine against exact integer arithmetic; checked before anything is timed."""

    max_rel_l2: float = Field(description="largest relative L2 error of a layer on equal inputs")
    bound: float = Field(description="what it must not exceed")
    layer: str = Field(description="the layer with that error")
    layers_checked: int
    layers: int = Field(description="layers there are; where fewer are checked, one of each shape and operation is")
    prediction_rel_l2: float = Field(description="the whole denoiser, as it is timed")
    prediction_bound: float
    quantization_rel_l2: float = Field(description="exact integers against full precision: what quantization costs")


class Speedup(_Record):
    """How many times faster than floating point, by medians; below 1 is slower."""

    contender: str
    vs_fp32_eager: float
    vs_best_float: float
    best_float: str


class LayerRow(_Record):
    """The precision that a layer really ran in."""

    name: str
    kind: str
    planned: str
    precision: str
    reason: str | None


class KindRow(_Record):
    """Time of a call by kind of operation, from the engine's own profile."""

    kind: str
    precision: str
    count: int
    milliseconds: float
    share: float
    gmacs: float | None = Field(description="billions of multiply-accumulates; null for what multiplies nothing")
    tops: float | None = Field(description="trillions of operations a second, two to a multiply-accumulate")
    percent_of_peak: float | None = Field(description="of the largest rate that was measured here in that precision")


class QuantizedFacts(_Record):
    """What belongs to one bit width."""

    coverage: Coverage
    parity: EngineParity
    speedup: Speedup
    layers: tuple[LayerRow, ...]
    by_kind: tuple[KindRow, ...]


class BenchFacts(_Record):
    """What a bench measured. `coverage`, `parity` and `speedup` are those of the first bit width."""

    subject: str = Field(description="what was measured, for people to read")
    bits: tuple[str, ...]
    machine: dict[str, Any]
    engine: str
    coverage: Coverage
    parity: EngineParity
    contenders: tuple[Contender, ...]
    left_out: dict[str, str] = Field({}, description="contenders that could not be measured, with the reason")
    speedup: Speedup
    by_bits: dict[str, QuantizedFacts]
    peak_tops: dict[str, float] = Field(description="precision -> largest rate measured, 10^12 operations a second")
    headline: str = Field(description="the outcome in a sentence or two")


class BenchRecord(BenchFacts, StageRecord):
    """Speed, size and memory."""

    command: str = "bench"


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
