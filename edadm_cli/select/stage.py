"""`edadm select`: chooses steps of the trajectories (one of each by default) for the calibration set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edadm_cli.artifacts import (
    Artifact,
    BuildSpec,
    RunFolder,
    Selection,
    SelectRecord,
    read_tensor_header,
    save_tensors,
    shared_keys,
)
from edadm_cli.artifacts.streaming import slices
from edadm_cli.config import EARLIER_DENSITY_QUANTILE, SelectConfig
from edadm_cli.errors import InputError, MachineError, UsageError
from edadm_cli.models.collected import CONDITION_FILE, CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CALIBRATION_FILE, CONDITION, CONSTANT, UNCONDITIONAL, CallForm
from edadm_cli.models.loading import resolve_device
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.select.control import with_computed
from edadm_cli.select.plot import draw_selection
from edadm_cli.select.strategies import ScoredSteps, SelectionStrategy, strategy_named
from edadm_cli.select.tdac import (
    LOCAL_QUANTILE,
    NormalisedScores,
    normalised_scores,
    rows_at_once,
    score_slices,
    total_variation,
)

SCORES_FILE = "scores.safetensors"
PLOT_FILE = "selection.png"
_MIB = 2**20


def run(
    config: SelectConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> SelectRecord:
    """Scores the steps, shares the samples out, and writes the `select` artifact.

    Raises:
        InputError: There is no `collect` artifact, or it is broken.
        UsageError: There is no such strategy, the trajectories have fewer samples than are requested, or a setting
            belongs to another strategy.
        MachineError: A strategy of another package cannot be loaded or returns no counts.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    collected = CollectedRun.open(run_folder)
    tasks = {place: prepare(config, collected, place) for place in collected.places}
    with run_folder.build(tasks[""].build_spec(), force) as build:
        is_done = build.up_to_date
        if not is_done:
            for place, task in tasks.items():
                _select(task, build.path / place, reporter)
            build.commit()
        artifact = build.artifact
        assert artifact is not None
    selection = Selection.load(artifact)
    return SelectRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=start, warnings=reporter.warnings),
        strategy=selection.strategy,
        counts=selection.counts,
        density_radius=selection.density_radius,
        variety_weight=selection.variety_weight,
        total_variation=total_variation(torch.tensor(selection.counts)),
        further_counts={place: Selection.load(artifact.within(place)).counts for place in collected.places if place},
    )


def build_spec(config: SelectConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without selecting."""
    return prepare(config, CollectedRun.open(run_folder)).build_spec()


def artifact_name(config: SelectConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""
    return None


@dataclass(frozen=True)
class Task:
    """A configuration whose open choices are all decided, with its trajectories.

    Attributes:
        run: The run with the `collect` artifact.
        collected: The part of it that belongs to one denoiser.
        strategy: How the samples are shared out over the steps.
        timesteps: The scheduler's value at each step, with shape `(T,)`.
        num_samples: N.
        variety_weight: lambda.
        radius: r; `None` if a quantile of the distances decides it.
    """

    config: SelectConfig
    strategy: SelectionStrategy
    run: CollectedRun
    collected: Artifact
    timesteps: Tensor
    num_trajectories: int
    num_samples: int
    variety_weight: float
    radius: float | None

    @property
    def quantile(self) -> float:
        """Share of the pairs of steps within the radius, if no radius is given."""
        return LOCAL_QUANTILE if self.config.density_quantile is None else self.config.density_quantile

    @property
    def radius_source(self) -> str | None:
        """Description of the source of r for people; `None` for strategies without a radius."""
        if not self.strategy.uses_scores:
            return None
        if self.config.density_radius is not None:
            return "given"
        if self.radius is not None:
            return "the model's published one"
        missing = "the model has no published one: " if self.config.model_radius else ""
        return f"{missing}{self.quantile:.0%} quantile of the pairwise distances"

    def build_spec(self) -> BuildSpec:
        """Returns the specification of the artifact."""
        fields = {
            **self.config.identity_fields(),
            "num_samples": self.num_samples,
            "variety_weight": self.variety_weight if self.strategy.uses_scores else None,
        }
        fields.pop("model_radius", None)
        fields.pop("density_quantile", None)
        if self.strategy.uses_scores:
            fields["density_radius"] = self.radius
            if self.radius is None and self.quantile != EARLIER_DENSITY_QUANTILE:
                fields["density_quantile"] = self.quantile
        return BuildSpec("select", None, fields, self.config.seed, (self.run.artifact,), self.run.model)


def prepare(config: SelectConfig, collected: CollectedRun, place: str = "") -> Task:
    """Decides what the configuration leaves open for the trajectories of one denoiser; see `CollectedRun.places`."""
    strategy = strategy_named(config.strategy)
    part = collected.artifact.within(place)
    num_trajectories = collected.num_trajectories
    timesteps = part.tensors("features.safetensors", ["timesteps"])["timesteps"]
    num_samples = config.num_samples or num_trajectories * min(config.samples_per_trajectory, len(timesteps))
    if num_samples > num_trajectories * len(timesteps):
        raise UsageError(
            f"{num_samples} samples were asked for, and {num_trajectories} trajectories of {len(timesteps)} steps have"
            f" {num_trajectories * len(timesteps)}.",
            hint=f"edadm collect --num-trajectories {-(-num_samples // len(timesteps))} --force",
        )
    if not strategy.uses_scores:
        for flag, value in (
            ("density-radius", config.density_radius),
            ("variety-weight", config.variety_weight),
            ("density-quantile", config.density_quantile),
        ):
            if value is not None:
                raise UsageError(f"--{flag} belongs to the strategy tdac and has no meaning for {strategy.name}.")
    default_weight = collected.entry.variety_weight
    radius = collected.entry.density_radius if config.model_radius and strategy.uses_scores else None
    return Task(
        config=config,
        strategy=strategy,
        run=collected,
        collected=part,
        timesteps=timesteps,
        num_trajectories=num_trajectories,
        num_samples=num_samples,
        variety_weight=default_weight if config.variety_weight is None else config.variety_weight,
        radius=radius if config.density_radius is None else config.density_radius,
    )


def _select(task: Task, folder: Path, reporter: Reporter) -> None:
    folder.mkdir(exist_ok=True)
    shape, portions = feature_slices(task.collected)
    with reporter.task("Comparing steps", math.ceil(shape[1] / rows_at_once(shape))) as advance:
        scores = score_slices(_counted(portions, advance))
    if not bool(scores.distances.isfinite().all() and scores.variety.isfinite().all()):
        raise InputError(f"The mid-block features of {task.collected.path} are not finite.", hint=task.collected.remedy)
    normalised = normalised_scores(scores, task.radius, task.quantile)
    counts = _counts(task, normalised)
    step_index, trajectory_index = assign_trajectories(counts, task.num_trajectories, _generator(task, 0))
    form = CallForm.load(task.collected)
    tensors = _calibration_set(task, form, step_index, trajectory_index, reporter)
    if form.control is not None:
        tensors = with_computed(tensors, form, task.run, resolve_device(task.config.device), reporter)
    save_tensors(folder / CALIBRATION_FILE, tensors)
    scored = {"density": normalised.density, "variety": normalised.variety, "counts": counts}
    save_tensors(folder / SCORES_FILE, scored)
    form.model_copy(update={"control": None, "varying": ()}).save(folder)
    _selection(task, normalised, counts).save(folder)
    title = f"{task.config.strategy}: {task.num_samples} samples from {len(counts)} steps"
    draw_selection(folder / PLOT_FILE, title, task.timesteps, normalised.density, normalised.variety, counts)


def feature_slices(collected: Artifact) -> tuple[tuple[int, ...], Iterator[Tensor]]:
    """Returns the shape of the mid-block features, and an iterator that reads their rows in portions."""
    path = collected.file("features.safetensors")
    shape = read_tensor_header(path)["features"].shape
    return shape, slices(path, "features", 1, rows_at_once(shape))


def _counted(portions: Iterator[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for portion in portions:
        yield portion
        advance(1)


def assign_trajectories(counts: Tensor, num_trajectories: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Decides by a random permutation which trajectory gives which step.

    Args:
        counts: Samples per step, with shape `(T,)`; none above `num_trajectories`.
        num_trajectories: Number of trajectories.
        generator: The random generator of the permutation.

    Returns:
        Step and trajectory of each sample, in the order of the trajectories. Each trajectory gives one sample before
        any gives a second one, and no trajectory gives a step twice.
    """
    step_index = torch.repeat_interleave(torch.arange(len(counts)), counts)
    permutation = torch.randperm(num_trajectories, generator=generator)
    trajectory_index = permutation[torch.arange(len(step_index)) % num_trajectories]
    order = trajectory_index.argsort(stable=True)
    return step_index[order], trajectory_index[order]


def _counts(task: Task, scores: NormalisedScores) -> Tensor:
    """Returns how many samples each step gives.

    Raises:
        UsageError: A step would give more samples than there are trajectories.
        MachineError: The strategy of another package returned something else than counts that sum to N.
    """
    num_steps, num_samples = len(task.timesteps), task.num_samples
    steps = ScoredSteps(task.timesteps, scores.density, scores.variety, task.variety_weight)
    counts = task.strategy.counts(steps, num_samples, _generator(task, 1))
    is_sound = counts.shape == (num_steps,) and counts.dtype == torch.int64 and int(counts.min()) >= 0
    if not is_sound or int(counts.sum()) != num_samples:
        raise MachineError(
            f"The strategy '{task.strategy.name}' returned {counts.tolist()}, where {num_steps} integers that sum to"
            f" {num_samples} are expected.",
            hint="update or uninstall the package that adds it",
        )
    if int(counts.max()) > task.num_trajectories:
        raise UsageError(
            f"Step {int(counts.argmax())} would give {int(counts.max())} of {num_samples} samples, and each of the"
            f" {task.num_trajectories} trajectories has that step once.",
            hint=f"edadm collect --num-trajectories {int(counts.max())} --force, or fewer --num-samples",
        )
    return counts


def _generator(task: Task, stream: int) -> torch.Generator:
    """Returns the generator of the permutation (stream 0) or of random counts (stream 1)."""
    return torch.Generator().manual_seed((2 * task.config.seed + stream) % 2**32)


def _calibration_set(
    task: Task, form: CallForm, step_index: Tensor, trajectory_index: Tensor, reporter: Reporter
) -> dict[str, Tensor]:
    """Gathers the chosen steps, reading one shard of trajectories at a time."""
    names = sorted(e.path for e in task.collected.manifest.payload if e.path.startswith("latents-"))
    chosen, first = [], 0
    with reporter.task("Gathering samples", len(names)) as advance:
        for name in names:
            latents = task.collected.tensors(name, ["latents"])["latents"]  # [T, n, *]
            is_here = (trajectory_index >= first) & (trajectory_index < first + latents.shape[1])
            samples = latents[step_index[is_here], trajectory_index[is_here] - first]
            if not bool(samples.isfinite().all()):
                raise InputError(
                    f"The latents in {task.collected.path / name} are not finite.", hint=task.collected.remedy
                )
            chosen.append(samples)
            first += latents.shape[1]
            advance(1)
    varying = {prefix + name for name in form.varying for prefix in (CONDITION, UNCONDITIONAL)}
    conditions = task.collected.tensors(CONDITION_FILE)
    for name in sorted(varying & conditions.keys()):
        if conditions[name].shape[1:2] != (len(task.timesteps),):
            path = task.collected.path / CONDITION_FILE
            raise InputError(
                f"'{name}' in {path} has not one value for each of {len(task.timesteps)} steps.",
                hint=task.collected.remedy,
            )
    return {
        **{name: tensor for name, tensor in conditions.items() if name.startswith(CONSTANT)},
        **{
            name: tensor[trajectory_index, step_index] if name in varying else tensor[trajectory_index]
            for name, tensor in conditions.items()
            if not name.startswith(CONSTANT)
        },
        "sample": torch.cat(chosen),
        "timestep": task.timesteps[step_index],
        "step_index": step_index,
        "trajectory_index": trajectory_index,
    }


def _selection(task: Task, scores: NormalisedScores, counts: Tensor) -> Selection:
    uses_scores = task.strategy.uses_scores
    return Selection(
        strategy=task.strategy.name,
        strategy_description=task.strategy.description,
        num_samples=task.num_samples,
        num_trajectories=task.num_trajectories,
        density_radius=scores.radius if uses_scores else None,
        density_radius_source=task.radius_source,
        variety_weight=task.variety_weight if uses_scores else None,
        steps_from_the_clean_end=task.strategy.steps_from_the_clean_end(len(counts)),
        timesteps=tuple(task.timesteps.tolist()),
        counts=tuple(counts.tolist()),
        density=tuple(scores.density.tolist()),
        variety=tuple(scores.variety.tolist()),
    )
