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
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.calibration import CALIBRATION_FILE, CONDITION, CONSTANT, UNCONDITIONAL, CallForm
from edadm_cli.models.collected import CONDITION_FILE, CollectedRun
from edadm_cli.models.loading import resolve_device
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.select.control import with_computed
from edadm_cli.select.plot import draw_selection
from edadm_cli.select.strategies import (
    NORMAL_DEVIATION,
    NORMAL_MEAN,
    last_counts,
    normal_counts,
    random_counts,
    uniform_counts,
)
from edadm_cli.select.tdac import (
    LOCAL_QUANTILE,
    Allocation,
    allocate,
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
        UsageError: More samples are requested than the trajectories have, or a setting belongs to another strategy.
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
    """

    config: SelectConfig
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
        if not self.is_tdac:
            return None
        if self.config.density_radius is not None:
            return "given"
        if self.radius is not None:
            return "the model's published one"
        missing = "the model has no published one: " if self.config.model_radius else ""
        return f"{missing}{self.quantile:.0%} quantile of the pairwise distances"

    @property
    def is_tdac(self) -> bool:
        """Whether steps are chosen by density and variety."""
        return self.config.strategy == "tdac"

    def build_spec(self) -> BuildSpec:
        """Returns the specification of the artifact."""
        fields = {
            **self.config.identity_fields(),
            "num_samples": self.num_samples,
            "variety_weight": self.variety_weight if self.is_tdac else None,
        }
        fields.pop("model_radius", None)
        fields.pop("density_quantile", None)
        if self.is_tdac:
            fields["density_radius"] = self.radius
            if self.radius is None and self.quantile != EARLIER_DENSITY_QUANTILE:
                fields["density_quantile"] = self.quantile
        return BuildSpec("select", None, fields, self.config.seed, (self.run.artifact,), self.run.model)


def prepare(config: SelectConfig, collected: CollectedRun, place: str = "") -> Task:
    """Decides what the configuration leaves open for the trajectories of one denoiser; see `CollectedRun.places`."""
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
    if config.strategy != "tdac":
        for flag, value in (
            ("density-radius", config.density_radius),
            ("variety-weight", config.variety_weight),
            ("density-quantile", config.density_quantile),
        ):
            if value is not None:
                raise UsageError(f"--{flag} belongs to the strategy tdac and has no meaning for {config.strategy}.")
    default_weight = collected.entry.variety_weight
    radius = collected.entry.density_radius if config.model_radius and config.strategy == "tdac" else None
    return Task(
        config=config,
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
    allocation = allocate(scores, task.num_samples, task.variety_weight, task.radius, task.quantile)
    counts = _counts(task, allocation)
    step_index, trajectory_index = assign_trajectories(counts, task.num_trajectories, _generator(task, 0))
    form = CallForm.load(task.collected)
    tensors = _calibration_set(task, form, step_index, trajectory_index, reporter)
    if form.control is not None:
        tensors = with_computed(tensors, form, task.run, resolve_device(task.config.device), reporter)
    save_tensors(folder / CALIBRATION_FILE, tensors)
    scored = {"density": allocation.density, "variety": allocation.variety, "counts": counts}
    save_tensors(folder / SCORES_FILE, scored)
    form.model_copy(update={"control": None, "varying": ()}).save(folder)
    _selection(task, allocation, counts).save(folder)
    title = f"{task.config.strategy}: {task.num_samples} samples from {len(counts)} steps"
    draw_selection(folder / PLOT_FILE, title, task.timesteps, allocation.density, allocation.variety, counts)


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


def _counts(task: Task, allocation: Allocation) -> Tensor:
    """Returns how many samples each step gives.

    Raises:
        UsageError: A step would give more samples than there are trajectories.
    """
    counts = _strategy_counts(task, allocation)
    if int(counts.max()) > task.num_trajectories:
        raise UsageError(
            f"Step {int(counts.argmax())} would give {int(counts.max())} of {task.num_samples} samples, and each of the"
            f" {task.num_trajectories} trajectories has that step once.",
            hint=f"edadm collect --num-trajectories {int(counts.max())} --force, or fewer --num-samples",
        )
    return counts


def _strategy_counts(task: Task, allocation: Allocation) -> Tensor:
    num_steps, num_samples = len(task.timesteps), task.num_samples
    match task.config.strategy:
        case "tdac":
            return allocation.counts
        case "uniform":
            return uniform_counts(num_steps, num_samples)
        case "normal":
            return normal_counts(num_steps, num_samples, _generator(task, 1))
        case "random":
            return random_counts(num_steps, num_samples, _generator(task, 1))
        case "last":
            return last_counts(num_steps, num_samples)


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


def _selection(task: Task, allocation: Allocation, counts: Tensor) -> Selection:
    num_steps = len(counts)
    deviation = {"mean": NORMAL_MEAN * num_steps, "deviation": NORMAL_DEVIATION * num_steps}
    return Selection(
        strategy=task.config.strategy,
        num_samples=task.num_samples,
        num_trajectories=task.num_trajectories,
        density_radius=allocation.radius if task.is_tdac else None,
        density_radius_source=task.radius_source,
        variety_weight=task.variety_weight if task.is_tdac else None,
        steps_from_the_clean_end=deviation if task.config.strategy == "normal" else None,
        timesteps=tuple(task.timesteps.tolist()),
        counts=tuple(counts.tolist()),
        density=tuple(allocation.density.tolist()),
        variety=tuple(allocation.variety.tolist()),
    )
