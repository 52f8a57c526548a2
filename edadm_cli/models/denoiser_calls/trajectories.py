"""Gathers samples from the trajectories that `collect` stored: some steps of some of them, with their conditions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact
from edadm_cli.errors import InputError
from edadm_cli.models.collected import CONDITION, CONDITION_FILE, CONSTANT, UNCONDITIONAL, timesteps_of
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet, CallForm
from edadm_cli.progress import Reporter


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


def equal_counts(num_samples: int, num_steps: int) -> Tensor:
    """Returns how many samples each step gives, `(T,)`, if all give equally many; a remainder is spread evenly."""
    bounds = torch.arange(num_steps + 1) * num_samples // num_steps
    return bounds.diff()


def gather_samples(
    collected: Artifact, form: CallForm, step_index: Tensor, trajectory_index: Tensor, reporter: Reporter
) -> dict[str, Tensor]:
    """Returns the tensors of a calibration set by their names in its file.

    Args:
        collected: The part of a `collect` artifact that belongs to one denoiser.
        form: The form of the denoiser's calls.
        step_index: The step of each sample, in the order of the trajectories.
        trajectory_index: The trajectory of each sample.
        reporter: It reports the progress.

    Raises:
        InputError: The trajectories are not finite, or do not fit their conditions.
    """
    conditions = collected.tensors(CONDITION_FILE)
    timesteps = timesteps_of(collected)
    varying = {prefix + name for name in form.varying for prefix in (CONDITION, UNCONDITIONAL)} & conditions.keys()
    _require_values_per_step(collected, {name: conditions[name] for name in sorted(varying)}, len(timesteps))
    return {
        **{name: tensor for name, tensor in conditions.items() if name.startswith(CONSTANT)},
        **{
            name: tensor[trajectory_index, step_index] if name in varying else tensor[trajectory_index]
            for name, tensor in conditions.items()
            if not name.startswith(CONSTANT)
        },
        "sample": _samples(collected, step_index, trajectory_index, reporter),
        "timestep": timesteps[step_index],
        "step_index": step_index,
        "trajectory_index": trajectory_index,
    }


def samples_of_all_steps(
    collected: Artifact, num_samples: int, num_trajectories: int, generator: torch.Generator, reporter: Reporter
) -> CalibrationSet | None:
    """Returns samples of which each step gives about as many; `None` if a control network computes some inputs.

    Args:
        collected: The part of a `collect` artifact that belongs to one denoiser.
        num_samples: Number of samples; all that there are, if these are fewer.
        num_trajectories: Number of trajectories.
        generator: The random generator that decides which trajectory gives which step.
        reporter: It reports the progress.
    """
    form = CallForm.load(collected)
    if form.control is not None:
        return None
    num_steps = len(timesteps_of(collected))
    counts = equal_counts(min(num_samples, num_steps * num_trajectories), num_steps)
    chosen = assign_trajectories(counts, num_trajectories, generator)
    return CalibrationSet.of(gather_samples(collected, form, *chosen, reporter), form)


def _samples(collected: Artifact, step_index: Tensor, trajectory_index: Tensor, reporter: Reporter) -> Tensor:
    """Returns the chosen steps of the trajectories, in order of trajectories; it reads one shard at a time."""
    names = sorted(e.path for e in collected.manifest.payload if e.path.startswith("latents-"))
    chosen, first = [], 0
    with reporter.task("Gathering samples", len(names)) as advance:
        for name in names:
            latents = collected.tensors(name, ["latents"])["latents"]  # [T, n, *]
            is_here = (trajectory_index >= first) & (trajectory_index < first + latents.shape[1])
            samples = latents[step_index[is_here], trajectory_index[is_here] - first]
            if not bool(samples.isfinite().all()):
                raise InputError(f"The latents in {collected.path / name} are not finite.", hint=collected.remedy)
            chosen.append(samples)
            first += latents.shape[1]
            advance(1)
    return torch.cat(chosen)


def _require_values_per_step(collected: Artifact, conditions: Mapping[str, Tensor], num_steps: int) -> None:
    for name, tensor in conditions.items():
        if tensor.shape[1:2] != (num_steps,):
            path = collected.path / CONDITION_FILE
            raise InputError(
                f"'{name}' in {path} has not one value for each of {num_steps} steps.", hint=collected.remedy
            )
