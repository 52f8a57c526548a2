"""The JSON files that stages read of each other, as pydantic models, which refuse damaged or foreign files.

A payload is one JSON file of an artifact. The stage that builds the artifact writes it through its model, and all other
stages read it through the same model. `docs/` and other tools rely on the keys. A new field has a default, so that
artifacts of older versions stay readable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from edadm_cli.artifacts.artifact import Artifact
from edadm_cli.artifacts.bench_records import BenchFacts
from edadm_cli.artifacts.files import read_text, save_json
from edadm_cli.artifacts.json_text import parse_json
from edadm_cli.artifacts.records import (
    CallTime,
    Coverage,
    Distance,
    Loss,
    Metric,
    OneStepError,
    Parity,
    PipelineSize,
    TextEncoder,
)
from edadm_cli.errors import InputError, explain_field

Model = TypeVar("Model", bound=BaseModel)
MAX_COUNT = 10**9
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A number of things."""
NumSteps = Annotated[int, Field(ge=1, le=10**6)]
Scale = Annotated[float, Field(ge=0)]


class Payload(BaseModel):
    """One JSON file of an artifact.

    Attributes:
        FILE: Its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    FILE: ClassVar[str]

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        """Reads the file of an artifact.

        Raises:
            InputError: The artifact has no such file, or a field of it is missing, unknown or invalid.
        """
        return load_payload(artifact, cls.FILE, cls)

    def save(self, folder: Path) -> None:
        """Writes the file into a folder, whole or not at all."""
        save_json(folder / self.FILE, self.model_dump(mode="json", by_alias=True))


def load_payload(artifact: Artifact, name: str, model: type[Model]) -> Model:
    """Reads a JSON file of an artifact as a pydantic model.

    Raises:
        InputError: The artifact has no such file, or the file does not fit the model.
    """
    path = artifact.file(name)
    try:
        return read_model(path, model)
    except InputError as error:
        raise InputError(error.message, hint=error.hint or artifact.remedy) from error


def read_model(path: Path, model: type[Model]) -> Model:
    """Reads a JSON file as a pydantic model, without any conversion between types.

    Raises:
        InputError: The file is missing, is not JSON, or does not fit the model.
    """
    text = read_text(path)
    parse_json(text, str(path))
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{path} does not fit this version of edadm: {explain_validation(error)}.") from error


def explain_validation(error: ValidationError) -> str:
    """Returns the first invalid field, and the problem with it."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"field '{where[:200]}': {explain_field(first)}" if where else explain_field(first)


class Selection(Payload):
    """`selection.json` of `select`: the steps that the calibration samples come from, and the scores behind it."""

    FILE: ClassVar[str] = "selection.json"

    strategy: str
    strategy_description: str = Field("", description="one sentence; absent in artifacts of earlier versions")
    num_samples: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    num_trajectories: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    density_radius: Scale | None
    density_radius_source: str | None
    variety_weight: Scale | None
    steps_from_the_clean_end: dict[str, float] | None = Field(None, description="of the strategy 'normal'")
    timesteps: tuple[int | float, ...] = Field(min_length=1, description="the scheduler's values, with shape (T,)")
    counts: tuple[Count, ...] = Field(description="samples per step, with shape (T,)")
    density: tuple[float, ...] = Field(description="D of TDAC, normalised, with shape (T,)")
    variety: tuple[float, ...] = Field(description="V of TDAC, normalised, with shape (T,)")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {len(self.timesteps), len(self.counts), len(self.density), len(self.variety)}
        if len(lengths) != 1:
            raise ValueError("timesteps, counts, density and variety differ in length")
        if sum(self.counts) != self.num_samples:
            raise ValueError(f"the counts sum to {sum(self.counts)}, and num_samples is {self.num_samples}")
        if max(self.counts) > self.num_trajectories:
            raise ValueError("a step gives more samples than there are trajectories")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_description(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "strategy_description" or value}


class _Learning(BaseModel):
    """What is known of a unit once it has learned, besides the two losses that every unit has that learned."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    curve: tuple[float, ...] = Field((), description="what was minimised, at fewer than 100 equally spaced iterations")
    loss_soft: float | None = Field(None, description="at the end of learning, before h was rounded to 0 or 1")
    undecided: float | None = Field(None, description="share of the weights with 0.05 < h < 0.95 at that time")
    is_nearest: bool = Field(
        False,
        description="whether learning raised the loss, so that the weights are as they were before it: rounded to "
        "nearest, or, where all units learn together, as each of them had learned",
    )


class UnitLosses(_Learning):
    """The losses of a unit that learned, or of all units together.

    A reconstruction keeps them in `unit.json` until it is complete.
    """

    loss_before: float = Field(description="with weights rounded to nearest, or as the units have learned them")
    loss_after: float = Field(description="with the rounding that is deployed")


class UnitRow(_Learning):
    """One unit of a reconstruction; the losses are null where the unit did not learn."""

    name: str
    kind: str
    layers: tuple[str, ...]
    loss_before: float | None
    loss_after: float | None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.loss_before is None) != (self.loss_after is None):
            raise ValueError("only one of loss_before and loss_after is there")
        return self


class Units(Payload):
    """`units.json` of `reconstruct`: the losses of all units, and the number of quantized layers."""

    FILE: ClassVar[str] = "units.json"

    units: tuple[UnitRow, ...]
    coverage: Coverage
    by_kind: dict[str, Count] = Field(description="kind of layer -> how many are quantized")
    loss: Loss
    together: UnitLosses | None = Field(None, description="of the prediction, where all units learned together")
    warnings: tuple[str, ...] = Field((), description="what the user was warned of")


class FusedLora(BaseModel):
    """An adapter that was fused into the weights of an export."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: str = Field(description="name of its file, without folders")
    sha256: str
    weight: float = Field(description="what its change is multiplied by")


class ExportFacts(Payload):
    """`export.json` of `export`: sizes on disk, and the comparison with the reconstruction."""

    FILE: ClassVar[str] = "export.json"

    denoiser: str = Field(description="the component that is quantized, a key of size_mib")
    further_denoisers: tuple[str, ...] = Field((), description="more components that are quantized")
    size_mib: dict[str, Annotated[float, Field(ge=0)]]
    parity: Parity
    layers_by_width: dict[str, Count] = Field({}, description="width such as w4a8, or float -> number of layers")
    verdict: tuple[str, ...] = Field((), description="the outcome in plain sentences")
    lora: tuple[FusedLora, ...] = Field((), description="adapters that were fused, in order")
    pipeline: PipelineSize | None = Field(None, description="size and memory of all components")
    text_encoders: dict[str, TextEncoder] = Field({}, description="those with 8-bit weights, by component")
    call_time: CallTime | None = Field(None, description="one call of the denoiser on the machine that exported")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key in (self.denoiser, *self.further_denoisers, "denoiser_fp32", "ratio"):
            if self.size_mib.get(key, 0.0) <= 0:
                raise ValueError(f"size_mib has no positive '{key}'")
        return self

    @property
    def denoiser_mib(self) -> float:
        """The size of all denoisers on disk, in MiB."""
        return sum(self.size_mib[name] for name in (self.denoiser, *self.further_denoisers))


class ShownImage(BaseModel):
    """One image at both precisions, by the names of its files in the artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int
    prompt: str | None
    full_precision: str
    quantized: str
    psnr_db: float | None = None
    latent_rel_l2: float | None = None


class Evaluation(Payload):
    """`evaluation.json` of `evaluate`: metrics at both precisions, and the distance between them."""

    FILE: ClassVar[str] = "evaluation.json"

    bits: str
    metrics: dict[str, Metric]
    full_precision: dict[str, Metric]
    distance_to_full_precision: Distance
    num_images: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    num_identical_images: Count | None = None
    num_steps: NumSteps
    guidance_scale: Scale | None
    grid: str = "grid.png"
    shown: tuple[ShownImage, ...]
    skipped: dict[str, str] = Field({}, description="metrics that could not be computed, with the reason")
    cautions: tuple[str, ...] = Field((), description="what the metrics do not say")
    real: str | None = Field(None, description="the real images that were compared with")
    dtype: str | None = None
    one_step: OneStepError | None = None
    verdict: tuple[str, ...] = Field((), description="the outcome in plain sentences")


class _Machine(BaseModel):
    """The facts about a machine that a report reads; the file has further ones."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    cpu: str
    threads: Count
    logical_cores: Count | None
    cpu_flags: list[str]
    versions: dict[str, str]
    gpu: dict[str, Any] | None = None


class BenchResult(Payload, BenchFacts):
    """`bench.json` of `bench`: speed, size and memory."""

    FILE: ClassVar[str] = "bench.json"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.contenders:
            raise ValueError("there are no contenders")
        try:
            _Machine.model_validate(self.machine)
        except ValidationError as error:
            raise ValueError(f"machine: {explain_validation(error)}") from error
        return self


def recipe_name(reconstruction: Artifact) -> str:
    """Returns the name of the recipe of a reconstruction.

    Raises:
        InputError: Its manifest names no recipe.
    """
    recipe: Any = reconstruction.manifest.config.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{reconstruction.path / 'manifest.json'} names no recipe.", hint=reconstruction.remedy)
    return name
