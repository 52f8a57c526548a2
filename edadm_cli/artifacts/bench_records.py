"""The results of `edadm bench`, with the keys of its JSON object."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from edadm_cli.artifacts.records import Coverage, Record, StageRecord


class Latency(Record):
    """Time of one call of the denoiser over all samples, in milliseconds."""

    median: float
    min: float
    max: float
    num_samples: int


class PipelineTime(Record):
    """Time of one whole image, in seconds; `denoiser_share` is the part spent in the denoiser."""

    seconds: float
    num_steps: int
    denoiser_share: float
    cache: str | None = Field(None, description="step cache with which the image was generated; null for none")


class Contender(Record):
    """The measurement of one way to run the denoiser."""

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
    throughput: dict[str, float] = Field(description="batch size -> rows per second")
    pipeline: PipelineTime | None = None


class EngineParity(Record):
    """A quantized denoiser on an engine against exact integer arithmetic; checked before anything is timed."""

    max_rel_l2: float = Field(description="largest relative L2 error of a layer on equal inputs")
    bound: float = Field(description="what it must not exceed")
    layer: str = Field(description="the layer with that error")
    layers_checked: int
    layers: int = Field(description="number of layers; if fewer are checked, one of each shape and operation is")
    prediction_rel_l2: float = Field(description="the whole denoiser, as it is timed")
    prediction_bound: float
    quantization_rel_l2: float = Field(description="exact integers against full precision: what quantization costs")


class Speedup(Record):
    """How many times faster than floating point, by medians; below 1 is slower."""

    contender: str
    vs_fp32_eager: float
    vs_best_float: float
    best_float: str


class LayerRow(Record):
    """The precision that a layer really ran in."""

    name: str
    kind: str
    planned: str
    precision: str
    reason: str | None


class KindRow(Record):
    """Time of a call by kind of operation, from the engine's own profile."""

    kind: str
    precision: str
    count: int
    milliseconds: float
    share: float
    gmacs: float | None = Field(description="billions of multiply-accumulates; null for operations without products")
    tops: float | None = Field(description="trillions of operations per second, two per multiply-accumulate")
    percent_of_peak: float | None = Field(description="of the largest rate that was measured here in that precision")


class QuantizedFacts(Record):
    """The results of one bit width."""

    coverage: Coverage
    parity: EngineParity
    speedup: Speedup
    layers: tuple[LayerRow, ...]
    by_kind: tuple[KindRow, ...]


class BenchFacts(Record):
    """The results of a bench. `coverage`, `parity` and `speedup` are those of the first bit width."""

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
    peak_tops: dict[str, float] = Field(description="precision -> largest rate measured, 10^12 operations per second")
    headline: str = Field(description="the outcome in a sentence or two")
    part_seconds: dict[str, float] = Field({}, description="part of the measurement -> seconds that it took")


class BenchRecord(BenchFacts, StageRecord):
    """Speed, size and memory."""

    command: str = "bench"
