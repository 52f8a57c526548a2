"""Measures how far the errors of each sampler step move the final sample, for units that learn together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edadm_cli.models.collected import CollectedRun, timesteps_of
from edadm_cli.models.pipeline_calls.backward_sweep import error_effects
from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError
from edadm_cli.progress import Reporter
from edadm_cli.reconstruct.task import Task

_IMAGES = 32  # at most: images differ in their sensitivity by far more than the steps of one image


def measured_effects(task: Task, place: str, quantized: nn.Module, reporter: Reporter) -> Tensor | None:
    """Returns the effect of each step of a denoiser, `(T,)`; `None` where it cannot be measured, which is reported.

    The main process measures. It loads the whole pipeline for it.

    Args:
        task: What is reconstructed.
        place: Which denoiser; see `CollectedRun.places`.
        quantized: This denoiser, quantized with what its units have learned by themselves.
        reporter: It reports the progress.

    Raises:
        MachineError: The device ran out of memory.
    """
    effects = _measured(task, place, quantized, reporter) if task.processes.is_main else None
    effects = task.processes.share(effects)
    return None if effects is None else torch.tensor(effects, dtype=torch.float64)


def _measured(task: Task, place: str, quantized: nn.Module, reporter: Reporter) -> list[float] | None:
    collected = CollectedRun.open(task.run)
    num_steps = {each: len(timesteps_of(collected.artifact.within(each))) for each in collected.places}
    model = collected.load(task.device, torch.float32)
    count = min(_IMAGES, task.batch_size, collected.num_trajectories)
    try:
        with reporter.task("follow final samples back", sum(num_steps.values())) as advance:
            effects = error_effects(model, collected.sampling, place, quantized, count, task.config.seed, advance)
    except NoGradientError as error:
        reporter.warn(f"{error.message} So all sampler steps count alike while all units learn together.")
        return None
    if len(effects) != num_steps[place]:
        reporter.warn(
            f"The sampler calls the denoiser {len(effects)} times in {num_steps[place]} steps, so all steps count alike"
            " while all units learn together."
        )
        return None
    return effects.tolist()
