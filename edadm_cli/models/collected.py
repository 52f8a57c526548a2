"""Reads a run's `collect` artifact: how its trajectories were sampled, and the model, which it loads again.

The libraries that load the model are imported when it is loaded: a stage that is up to date reads the artifact alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.artifacts import Artifact, ModelRef, Payload, RunFolder
from edadm_cli.artifacts.payloads import NumSteps, Scale
from edadm_cli.artifacts.tensors import TensorInfo
from edadm_cli.errors import InputError, quoted
from edadm_cli.models.architecture import FurtherDenoiser
from edadm_cli.models.placement import LEARNING_SHARE, Placement, described, memory_of, not_readable_from_disk
from edadm_cli.models.registry import ModelEntry
from edadm_cli.stage_config import DTypeName, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from edadm_cli.models.loaded import LoadedModel

CONDITION_FILE = "condition.safetensors"
CONDITION, UNCONDITIONAL, CONSTANT = "condition.", "condition.unconditional.", "constant."
"""Starts of the names of tensors: of the branch with the prompt, of the other branch, and those that all rows share."""
FEATURES_FILE = "features.safetensors"
FEATURES, TIMESTEPS = "features", "timesteps"
"""The tensors of `FEATURES_FILE`: the mid-block features `(T, B, C, *)` and the scheduler's values `(T,)`."""
_FLOATS = ("F64", "F32", "F16", "BF16")


class SchedulerFacts(BaseModel):
    """The scheduler of the sampling, for people to read."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    class_name: str = Field(alias="class")
    config: dict[str, Any] = {}


class Sampling(Payload):
    """`sampling.json` of `collect`: how the trajectories were sampled."""

    FILE: ClassVar[str] = "sampling.json"

    model: ModelRef
    entry: ModelEntry
    dtype: DTypeName = Field(description="element type that the pipeline computed in")
    num_steps: NumSteps
    guidance_scale: Scale | None
    eta: Annotated[float, Field(ge=0, le=1)]
    scheduler: SchedulerFacts
    prompts: tuple[str, ...] | None = Field(min_length=1, description="one per trajectory; null: the model takes none")
    seeds: tuple[int, ...] = Field(min_length=1, description="one per trajectory")
    further_denoisers: tuple[FurtherDenoiser, ...] = Field(
        (), description="components that denoise beside the first denoiser; each has a folder in every artifact"
    )


@dataclass(frozen=True)
class CollectedRun:
    """A run folder with its `collect` artifact, opened and checked once.

    Attributes:
        run: The run folder.
        artifact: The `collect` artifact.
        sampling: How its trajectories were sampled.
    """

    run: RunFolder
    artifact: Artifact
    sampling: Sampling

    @classmethod
    def open(cls, run: RunFolder) -> CollectedRun:
        """Opens the `collect` artifact of a run.

        Raises:
            InputError: There is no such artifact, or it is broken.
        """
        artifact = run.open("collect")
        sampling = Sampling.load(artifact)
        collected = cls(run, artifact, sampling)
        for place in collected.places:
            part = artifact.within(place)
            problem = _misfit(part, len(sampling.seeds))
            if problem is not None:
                raise InputError(f"The files of {part.path} do not fit each other: {problem}.", hint=artifact.remedy)
        return collected

    @property
    def places(self) -> tuple[str, ...]:
        """The folder of each denoiser within every artifact: `""` of the first one, a name of every further one."""
        return ("", *self.sampling.further_denoisers)

    @property
    def model(self) -> ModelRef:
        """The model that was sampled."""
        return self.artifact.manifest.model

    @property
    def entry(self) -> ModelEntry:
        """The model's own defaults."""
        return self.sampling.entry

    @property
    def num_trajectories(self) -> int:
        """N, the number of trajectories."""
        return len(self.sampling.seeds)

    @property
    def num_steps(self) -> int:
        """T, the number of sampler steps of each trajectory."""
        return self.sampling.num_steps

    @property
    def guidance_scale(self) -> float | None:
        """Scale of classifier-free guidance; `None` if the pipeline has none."""
        return self.sampling.guidance_scale

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each trajectory; `None` if the pipeline takes none."""
        return None if self.sampling.prompts is None else list(self.sampling.prompts)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Element type that the pipeline computed in."""
        import torch

        dtype: torch.dtype = getattr(torch, self.sampling.dtype)
        return dtype

    def load(self, device: torch.device, dtype: torch.dtype, placement: Placement = "memory") -> LoadedModel:
        """Loads the full-precision pipeline that was sampled.

        Args:
            device: Where it computes.
            dtype: Element type of its weights and activations.
            placement: Where its weights are; see `load_model`.

        Raises:
            InputError: The model is gone, or its files are not those that were collected from.
        """
        from edadm_cli.models.families import prepare_calls
        from edadm_cli.models.loading import load_model

        entry = self.entry.model_copy(update={"revision": self.model.revision})
        model = load_model(self.model.id, device, dtype, entry, placement=placement)
        if model.ref.fingerprint != self.model.fingerprint:
            raise self._changed()
        for each in model.by_denoiser().values():
            prepare_calls(each.denoiser)
        return model

    def load_denoiser(
        self,
        device: torch.device,
        weights: Weights,
        place: str = "",
        note: Callable[[str], None] = lambda _: None,
    ) -> nn.Module:
        """Loads a denoiser alone, in float32, its large weights in memory or read whenever they are used.

        Args:
            device: Where it computes.
            weights: `disk` leaves them where they are stored; `auto` does so where they would take more than 45% of
                the device's memory. It does not change what is computed.
            place: Which denoiser, one of `places`.
            note: Called with a sentence where `auto` leaves them where they are stored.

        Raises:
            InputError: The model is gone, or its files are not those that were collected from.
            UsageError: The weights are to stay on disk, and the model's files do not allow that.
        """
        import torch

        from edadm_cli.models.families import prepare_calls
        from edadm_cli.models.sources.stored_denoiser import open_stored

        entry = self.entry.model_copy(update={"revision": self.model.revision})
        stored = None if weights == "memory" else open_stored(self.model.id, entry, place)
        if stored is None and weights == "disk":
            raise not_readable_from_disk(self.model.id)
        needed = 0 if stored is None else torch.float32.itemsize * stored.num_parameters
        if stored is None or (weights == "auto" and needed <= LEARNING_SHARE * memory_of(device)):
            return self.load(device, torch.float32).by_denoiser()[place].denoiser
        if stored.fingerprint() != self.model.fingerprint:
            raise self._changed()
        if weights == "auto":
            note(described("disk", needed, device))
        denoiser = stored.place(device, torch.float32)
        prepare_calls(denoiser)
        return denoiser

    def _changed(self) -> InputError:
        return InputError(
            f"The model {self.model.id} has changed since it was collected from.",
            hint=quoted("edadm", "collect", "--model", self.model.id, "--run", self.run.root, "--force"),
        )


def timesteps_of(collected: Artifact) -> Tensor:
    """Returns the scheduler's value at each step of one denoiser, with shape `(T,)`.

    Args:
        collected: The part of a `collect` artifact that belongs to the denoiser.
    """
    return collected.tensors(FEATURES_FILE, [TIMESTEPS])[TIMESTEPS]


def _misfit(artifact: Artifact, num_trajectories: int) -> str | None:
    """Returns what is wrong with the shapes of a `collect` artifact's tensors; `None` where they fit each other."""
    files = {entry.path: entry.tensors or {} for entry in artifact.manifest.payload}
    steps = files.get(FEATURES_FILE, {}).get(TIMESTEPS)
    if steps is None or len(steps.shape) != 1 or not steps.shape[0]:
        return f"{FEATURES_FILE} has no timesteps"
    latents = [tensors.get("latents") for name, tensors in sorted(files.items()) if name.startswith("latents-")]
    return (
        _misfit_of_features(files[FEATURES_FILE].get(FEATURES), steps)
        or _misfit_of_latents(latents, steps.shape[0], num_trajectories)
        or _misfit_of_condition(files.get(CONDITION_FILE, {}), num_trajectories)
    )


def _misfit_of_features(features: TensorInfo | None, steps: TensorInfo) -> str | None:
    num_steps = steps.shape[0]
    if features is None or len(features.shape) < 3 or features.shape[0] != num_steps or 0 in features.shape:
        return f"{FEATURES_FILE} has not the features of {num_steps} steps"
    if features.dtype not in _FLOATS or steps.dtype not in (*_FLOATS, "I64"):
        return f"{FEATURES_FILE} has features of type {features.dtype} and timesteps of type {steps.dtype}"
    return None


def _misfit_of_latents(latents: Sequence[TensorInfo | None], num_steps: int, num_trajectories: int) -> str | None:
    """Returns what is wrong with the latents `[T, n, *]` of the shards, whose n are added."""
    shards = [info for info in latents if info is not None and len(info.shape) >= 3]
    sizes = {(info.shape[0], *info.shape[2:]) for info in shards}
    if len(shards) != len(latents) or len(sizes) != 1 or shards[0].shape[0] != num_steps:
        return f"not every latents-*.safetensors has latents of one size at {num_steps} steps"
    if any(info.dtype not in _FLOATS for info in shards):
        return "the latents are not floating-point numbers"
    if 0 in shards[0].shape or sum(info.shape[1] for info in shards) != num_trajectories:
        return f"the latents are not those of {num_trajectories} trajectories"
    return None


def _misfit_of_condition(condition: Mapping[str, TensorInfo], num_trajectories: int) -> str | None:
    for name, info in condition.items():
        if not name.startswith(CONSTANT) and info.shape[:1] != (num_trajectories,):
            return f"'{name}' has not {num_trajectories} rows"
    return None
