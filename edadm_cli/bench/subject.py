"""What `bench` measures: the denoiser of a run's exports, or of a model whose weights it rounds to nearest itself."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Artifact, ModelRef, RunFolder
from edadm_cli.bench.pipeline import PipelineRequest
from edadm_cli.bench.spec import Call
from edadm_cli.calibrate.nearest import nearest_ranges, round_to_nearest
from edadm_cli.config import BenchConfig, BitWidth
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.architecture import WEIGHTS_VERSION, load_architecture
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.families import family_of
from edadm_cli.models.loading import load_model
from edadm_cli.models.random_models import SUFFIX, build_denoiser
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import Recipe, load_recipe

NUM_INPUTS = 3
"""Number of samples that successive calls of a contender take in turn.

The condition is the same in all of them, as it is while an image is generated."""
_CPU = torch.device("cpu")
_MIN_MAX = {"weight": "minmax", "activation": "minmax"}


class Subject(ABC):
    """A denoiser, at full precision and quantized, with example calls of it. All tensors are float32 and on the CPU.

    Attributes:
        title: What is measured, for people.
        model: The model, for the manifest.
        parents: The artifacts that the measurement depends on.
        num_denoisers: The number of denoisers of the pipeline, of which the first one is measured.
    """

    title: str
    model: ModelRef
    parents: tuple[Artifact, ...]
    num_denoisers: int

    @abstractmethod
    def full_precision(self) -> nn.Module:
        """Loads the denoiser at full precision; every call loads it again."""

    @abstractmethod
    def quantized(self, bits: BitWidth, full: Callable[[], nn.Module]) -> nn.Module:
        """Loads the denoiser with quantized layers, or quantizes what `full` loads; every call does so again."""

    @abstractmethod
    def call(self, denoiser: nn.Module, batch_size: int, size: tuple[int, int] | None) -> Call:
        """Returns one call of `batch_size` rows."""

    @abstractmethod
    def pipeline(self, seed: int) -> PipelineRequest:
        """Returns how a whole image is sampled."""

    def require_whole_pipeline(self) -> None:
        """Checks that the denoiser that is measured is the only one that an image needs.

        Raises:
            UsageError: The pipeline has several denoisers.
        """
        if self.num_denoisers > 1:
            raise UsageError(
                f"{self.model.id} has {self.num_denoisers} denoisers, and bench --pipeline takes one.",
                hint="edadm bench, without --pipeline: it measures the first denoiser",
            )

    def calls(self, denoiser: nn.Module, batch_size: int, size: tuple[int, int] | None, seed: int) -> list[Call]:
        """Returns `NUM_INPUTS` calls that differ in their sample: that of `call` first, then Gaussian noise."""
        first = self.call(denoiser, batch_size, size)
        sample = sample_of(denoiser, first)
        calls = [first]
        for index in range(1, NUM_INPUTS):
            generator = torch.Generator().manual_seed(seed + index)
            calls.append(exchanged(first, sample, torch.randn(sample.shape, generator=generator)))
        return calls


class ExportSubject(Subject):
    """The exports of a run, with calls from its calibration set.

    Args:
        run: The run folder.
        bits: The bit widths whose exports are measured.

    Raises:
        InputError: The run has no such export.
    """

    def __init__(self, run: RunFolder, bits: tuple[BitWidth, ...]) -> None:
        self._run = run
        self._exports = {str(width): run.open("export", str(width)) for width in bits}
        self._collected = CollectedRun.open(run)
        self.parents = tuple(self._exports.values())
        self.model = self._collected.model
        self.num_denoisers = number = len(self._collected.places)
        which = "the denoiser" if number == 1 else f"the first of {number} denoisers"
        self.title = f"{which} of {self.model.id}, as exported in {run.root}"

    @property
    def exports(self) -> dict[str, Artifact]:
        """Returns the export of each bit width."""
        return self._exports

    def full_precision(self) -> nn.Module:
        """Loads the denoiser that the run was collected from."""
        return self._collected.load(_CPU, torch.float32).denoiser

    def quantized(self, bits: BitWidth, full: Callable[[], nn.Module]) -> nn.Module:
        """Loads the denoiser of an export."""
        return load_model(str(self._exports[str(bits)].path), _CPU, torch.float32, self._entry).denoiser

    def call(self, denoiser: nn.Module, batch_size: int, size: tuple[int, int] | None) -> Call:
        """Returns a call with rows of the calibration set, repeated if there are too few; with `size`, with noise."""
        one_branch = replace(self._calibration, branches=1)
        call = one_branch.call([index % len(one_branch) for index in range(batch_size)], _CPU, torch.float32)
        if size is None:
            return call
        sample = sample_of(denoiser, call)
        noise = torch.randn((*sample.shape[:2], *size), generator=torch.Generator().manual_seed(0))
        return exchanged(call, sample, noise)

    def pipeline(self, seed: int) -> PipelineRequest:
        """Returns a request for an image with the steps, guidance and first prompt of the collected run."""
        prompts = self._collected.prompts
        return PipelineRequest(
            model=self.model.id,
            entry=self._collected.entry.model_dump(mode="json"),
            prompt=None if prompts is None else prompts[0],
            num_steps=self._collected.num_steps,
            guidance_scale=self._collected.guidance_scale,
            seed=seed,
        )

    @cached_property
    def _calibration(self) -> CalibrationSet:
        return CalibrationSet.load(self._run.open("select"))

    @property
    def _entry(self) -> ModelEntry:
        return self._collected.entry


class NearestSubject(Subject):
    """A model without a run, for measurements of speed and size but not of quality.

    Weights are rounded to nearest, and activation ranges come from a few calls with random values.

    Args:
        name: A known name, a folder or a hub id.
        recipe: Decides which layers and attention products are quantized; its range searches are not used. `None`
            stands for the default recipe.
        seed: The seed of the calls that give the ranges.
        device: Where random weights are made and all weights are rounded: a GPU takes seconds for 12 billion of them.
        size: Height and width of the sample that the ranges come from; `None` for the model's own.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe | None,
        seed: int,
        device: torch.device = _CPU,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.name, self._seed, self._device, self._size = name, seed, device, size
        self._entry = known_models().get(name)
        self._ranges: dict[BitWidth, tuple[QuantizationPlan, dict[str, Tensor]]] = {}
        recipe = recipe or load_recipe("default")
        self.recipe = recipe.model_copy(update={"ranges": recipe.ranges.model_copy(update=_MIN_MAX)})
        self.parents, self.num_denoisers = (), 1
        if self._entry is not None and self._entry.source == "random":
            architecture = load_architecture(self._entry.location)
            fingerprint = architecture.fingerprint(self._entry.weights_seed, WEIGHTS_VERSION)
            self.model = ModelRef(id=name, fingerprint=fingerprint)
        else:
            loaded = load_model(name, _CPU, torch.float32)
            self.model, self.num_denoisers = loaded.ref, 1 + len(loaded.further)
        weights = "random weights" if name.endswith(SUFFIX) else "its weights"
        self.title = f"the denoiser of {self.model.id}: {weights} rounded to nearest, ranges of random calls"

    def full_precision(self) -> nn.Module:
        """Builds the denoiser alone if its architecture is known, else loads the whole pipeline."""
        return nn.Module.to(self._built(), _CPU)

    def quantized(self, bits: BitWidth, full: Callable[[], nn.Module]) -> nn.Module:
        """Rounds the denoiser's weights to nearest, with ranges from one seeded call.

        Speed does not depend on the ranges, so more calls would only take time. The ranges are kept, so that the same
        denoiser can be made again without a call. A GPU makes random weights faster than they are read from a file, and
        a CPU does not.
        """
        denoiser = self._built() if self._device.type == "cuda" else full()
        if bits not in self._ranges:
            call = example_call(denoiser, batch_size=1, seed=self._seed, size=self._size)
            self._ranges[bits] = nearest_ranges(denoiser, self.recipe, bits, [call])
        round_to_nearest(denoiser, *self._ranges[bits])
        return nn.Module.to(denoiser, _CPU)

    def _built(self) -> nn.Module:
        """Returns the denoiser at full precision on the subject's device."""
        if self._entry is not None and self._entry.source == "random":
            location, seed = self._entry.location, self._entry.weights_seed
            return build_denoiser(location, seed=seed, device=self._device)
        return nn.Module.to(load_model(self.name, _CPU, torch.float32).denoiser, self._device)

    def call(self, denoiser: nn.Module, batch_size: int, size: tuple[int, int] | None) -> Call:
        """Returns a call with random values in the shapes that the architecture takes."""
        return example_call(denoiser, batch_size=batch_size, seed=self._seed, size=size)

    def pipeline(self, seed: int) -> PipelineRequest:
        """Returns a request for an image with the model's own steps and guidance."""
        entry = self._entry
        if entry is None:
            entry = load_model(self.name, _CPU, torch.float32).entry
        return PipelineRequest(
            model=self.name,
            entry=entry.model_dump(mode="json"),
            prompt="a photograph" if entry.prompts is None else "a handwritten seven",
            num_steps=entry.num_steps,
            guidance_scale=entry.guidance_scale,
            seed=seed,
        )


def subject_of(config: BenchConfig, run: RunFolder, device: torch.device = _CPU) -> Subject:
    """Returns the denoiser that a configuration asks to measure; what it computes itself it computes on `device`.

    Raises:
        InputError: The run has no such export, or the model is not found.
    """
    if config.model is not None:
        return NearestSubject(config.model, config.recipe, config.seed, device, config.size)
    return ExportSubject(run, config.bits)


def sample_of(denoiser: nn.Module, call: Call) -> Tensor:
    """Returns the noisy sample of a call."""
    names = list(inspect.signature(denoiser.forward).parameters)
    bound = {**dict(zip(names, call[0], strict=False)), **call[1]}
    sample = next((bound[name] for name in family_of(denoiser).sample_arguments if name in bound), None)
    if not isinstance(sample, Tensor):
        raise InputError(f"{type(denoiser).__name__} is called without a sample, so it cannot be measured.")
    return sample


def exchanged(value: Any, old: Tensor, new: Tensor) -> Any:
    """Returns a call in which the tensor `new` replaces `old`, wherever that occurs."""
    if value is old:
        return new
    if isinstance(value, Mapping):
        return {key: exchanged(item, old, new) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(exchanged(item, old, new) for item in value)
    return value
