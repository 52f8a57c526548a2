"""What each command returns: the JSON object of `--json`, key by key.

Keys are part of the interface: tools outside rely on them, and they do not change silently.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

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
    warnings: tuple[str, ...] = ()
    estimate: Estimate | None = Field(None, description="with status 'planned' only")

    @model_serializer(mode="wrap")
    def _without_empty_estimate(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.estimate is None:
            fields.pop("estimate", None)
        return fields


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


class Coverage(_Record):
    """How many layers were to be quantized, were quantized, and stay in floating point by the recipe."""

    planned: int
    quantized: int
    kept: int


class Loss(_Record):
    """Reconstruction loss, summed over the units; null where nothing is learned."""

    first: float | None = None
    last: float | None = None


class ReconstructRecord(StageRecord):
    """Quantization parameters."""

    command: str = "reconstruct"
    bits: str
    recipe: str
    units: int
    coverage: Coverage
    loss: Loss


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


class ExportRecord(StageRecord):
    """A quantized pipeline."""

    command: str = "export"
    bits: str
    size_mib: dict[str, float] = Field(description="each component on disk, denoiser_fp32, and ratio")
    parity: Parity


class Metric(_Record):
    """One figure of quality, with the features it was computed in."""

    value: float
    features: str
    num_images: int


class Distance(_Record):
    """Each image against the full-precision image of the same seed, on average."""

    psnr_db: float = Field(description="equal images count as the largest finite value their size allows")
    latent_rel_l2: float


class EvaluateRecord(StageRecord):
    """Quality of an export."""

    command: str = "evaluate"
    bits: str
    metrics: dict[str, Metric]
    distance_to_full_precision: Distance
    full_precision: dict[str, Metric]


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
