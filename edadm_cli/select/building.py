"""Builds the calibration set of one denoiser: scores the steps, shares the samples out, and gathers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact, Selection, read_tensor_header, save_tensors
from edadm_cli.artifacts.streaming import slices
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import FEATURES, FEATURES_FILE
from edadm_cli.models.denoiser_calls.calibration import CALIBRATION_FILE, CallForm
from edadm_cli.models.denoiser_calls.trajectories import assign_trajectories, gather_samples
from edadm_cli.models.loading import resolve_device
from edadm_cli.plugins import wrong_result
from edadm_cli.progress import Reporter
from edadm_cli.select.control import with_computed
from edadm_cli.select.plot import draw_selection
from edadm_cli.select.strategies import ScoredSteps
from edadm_cli.select.task import Task
from edadm_cli.select.tdac import NormalisedScores, normalised_scores, rows_at_once, score_slices

SCORES_FILE = "scores.safetensors"
PLOT_FILE = "selection.png"


def build(task: Task, folder: Path, reporter: Reporter) -> None:
    """Writes the calibration set of one denoiser into a folder, with its scores and their plot.

    Raises:
        InputError: The trajectories are not finite, or do not fit their conditions.
        UsageError: A step would give more samples than there are trajectories.
        MachineError: A strategy of another package returns no counts.
    """
    folder.mkdir(exist_ok=True)
    shape, portions = feature_slices(task.artifact)
    with reporter.task("Comparing steps", math.ceil(shape[1] / rows_at_once(shape))) as advance:
        scores = score_slices(_counted(portions, advance))
    if not bool(scores.distances.isfinite().all() and scores.variety.isfinite().all()):
        raise InputError(f"The mid-block features of {task.artifact.path} are not finite.", hint=task.artifact.remedy)
    normalised = normalised_scores(scores, task.radius, task.quantile)
    counts = _counts(task, normalised)
    step_index, trajectory_index = assign_trajectories(counts, task.num_trajectories, _generator(task, 0))
    form = CallForm.load(task.artifact)
    tensors = gather_samples(task.artifact, form, step_index, trajectory_index, reporter)
    if form.control is not None:
        tensors = with_computed(tensors, form, task.collected, resolve_device(task.config.device), reporter)
    save_tensors(folder / CALIBRATION_FILE, tensors)
    scored = {"density": normalised.density, "variety": normalised.variety, "counts": counts}
    save_tensors(folder / SCORES_FILE, scored)
    form.model_copy(update={"control": None, "varying": ()}).save(folder)
    _selection(task, normalised, counts).save(folder)
    title = f"{task.config.strategy}: {task.num_samples} samples from {len(counts)} steps"
    draw_selection(folder / PLOT_FILE, title, task.timesteps, normalised.density, normalised.variety, counts)


def feature_slices(collected: Artifact) -> tuple[tuple[int, ...], Iterator[Tensor]]:
    """Returns the shape of the mid-block features, and an iterator that reads their rows in portions."""
    path = collected.file(FEATURES_FILE)
    shape = read_tensor_header(path)[FEATURES].shape
    return shape, slices(path, FEATURES, 1, rows_at_once(shape))


def _counted(portions: Iterator[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for portion in portions:
        yield portion
        advance(1)


def _counts(task: Task, scores: NormalisedScores) -> Tensor:
    """Returns how many samples each step gives.

    Raises:
        UsageError: A step would give more samples than there are trajectories.
        MachineError: The strategy of another package returned something else than counts that sum to N.
    """
    num_steps, num_samples = len(task.timesteps), task.num_samples
    steps = ScoredSteps(task.timesteps, scores.density, scores.variety, task.variety_weight)
    counts = task.strategy.counts(steps, num_samples, _generator(task, 1))
    is_shaped = isinstance(counts, Tensor) and counts.shape == (num_steps,) and counts.dtype == torch.int64
    if not is_shaped or int(counts.min()) < 0 or int(counts.sum()) != num_samples:
        expected = f"a tensor of {num_steps} integers (int64) that sum to {num_samples}"
        raise wrong_result(f"The strategy '{task.strategy.name}'", task.strategy, counts, expected)
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
