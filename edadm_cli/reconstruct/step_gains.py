"""Measures how far a random error of each sampler step moves the final sample, for units that learn together."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_cli.models.collected import CollectedRun, timesteps_of
from edadm_cli.models.pipeline_calls.backward_sweep import step_gains
from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError
from edadm_cli.progress import Reporter
from edadm_cli.reconstruct.task import Task

_IMAGES = 8  # at most; a gain is a mean over them and the directions of each, and weights take its square root


def measured_step_gains(task: Task, place: str, reporter: Reporter) -> Tensor | None:
    """Returns the gain of each step of a denoiser, `(T,)`; `None` where it cannot be measured, which is reported.

    The main process measures. It loads the whole pipeline for it.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        reporter: It reports the progress.

    Raises:
        MachineError: The device ran out of memory.
    """
    gains = _measured(task, place, reporter) if task.processes.is_main else None
    gains = task.processes.share(gains)
    return None if gains is None else torch.tensor(gains, dtype=torch.float64)


def _measured(task: Task, place: str, reporter: Reporter) -> list[float] | None:
    collected = CollectedRun.open(task.run)
    num_steps = {each: len(timesteps_of(collected.artifact.within(each))) for each in collected.places}
    model = collected.load(task.device, torch.float32)
    count = min(_IMAGES, task.batch_size, collected.num_trajectories)
    try:
        with reporter.task("follow final samples back", sum(num_steps.values())) as advance:
            gains = step_gains(model, collected.sampling, num_steps, count, task.config.seed, advance)[place]
    except NoGradientError as error:
        reporter.warn(f"{error.message} So all sampler steps count alike while all units learn together.")
        return None
    if len(gains) != num_steps[place]:
        reporter.warn(
            f"The sampler calls the denoiser {len(gains)} times in {num_steps[place]} steps, so all steps count alike"
            " while all units learn together."
        )
        return None
    return [float(gain) for gain in gains]
