r"""Measures how much an error of the prediction at one step changes the final sample.

An error e of the prediction at step t changes the final latent x_0 by J_t e to first order. This module measures the
mean gain g_t = |J_t e|^2 / |e|^2 for random e: the sampler runs once as it is, and once per step with noise added to
the prediction of that step alone. Errors of different steps are then taken to add up in energy,

    |dx_0|^2  ~  sum_t g_t |e_t|^2,

which holds if they are not correlated. Correlated errors have a larger sum, in all layers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.predictions import prediction_of

NOISE_SHARE = 0.05
"""Root mean square of the added noise as a share of the prediction's."""


@dataclass(frozen=True)
class StepGains:
    """The effect of an error of the prediction at each step on the final sample.

    Attributes:
        gains: g_t of each step of the sampler, with shape `(T,)`: squared error of the final sample per
            squared error of the prediction.
        final_energy: Mean square of the final sample at full precision.
    """

    gains: Tensor
    final_energy: float


def measure_gains(
    denoiser: nn.Module,
    generate: Callable[[], Tensor],
    num_steps: int,
    branches: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> StepGains:
    """Measures the gain of each step with `num_steps + 1` runs of the sampler.

    Args:
        denoiser: The full-precision denoiser that `generate` calls.
        generate: Samples the same images every time; returns the final latents, with shape `(N, *)`.
        num_steps: T, the steps of the sampler. A step may consist of several calls, such as one per branch of guidance.
            All of them get the same noise, so that the guided prediction changes by exactly that noise.
        branches: 2 if the calibration set holds both branches of guidance, else 1. Where a step is one call, its rows
            are those of both branches, which get the same noise too.
        seed: Seed of the noise.
        advance: Progress callback, called with 1 after each run.

    Raises:
        InputError: The steps do not all have the same number of calls.
    """
    with _counted(denoiser) as calls:
        final = generate()
    advance(1)
    per_step, rest = divmod(len(calls), num_steps)
    if rest or not per_step:
        raise InputError(
            f"The sampler calls the denoiser {len(calls)} times in {num_steps} steps, so not every step has as many"
            " calls, and the effect of an error at one step cannot be measured.",
            hint="edadm reconstruct --bits w4a8, or another width that all layers have",
        )
    gains = torch.zeros(num_steps, dtype=torch.float64)
    for index in range(num_steps):
        added: list[float] = []
        of_step = range(index * per_step, (index + 1) * per_step)
        with _noise_at_calls(denoiser, of_step, branches if per_step == 1 else 1, seed + index, added):
            changed = generate()
        gains[index] = (changed - final).double().square().mean() / max(added[0], 1e-30)
        advance(1)
    return StepGains(gains, float(final.double().square().mean()))


@contextmanager
def _counted(denoiser: nn.Module) -> Iterator[list[None]]:
    """Yields a list that gets an entry for each call of the denoiser."""
    calls: list[None] = []
    with Hooks() as hooks:
        hooks.after(denoiser, lambda *_: calls.append(None))
        yield calls


@contextmanager
def _noise_at_calls(denoiser: nn.Module, calls: range, branches: int, seed: int, added: list[float]) -> Iterator[None]:
    """Adds the same noise to the denoiser's output in some of its calls; `added` receives the noise's mean square."""
    generator = torch.Generator().manual_seed(seed)
    number, noise = -1, torch.zeros(())

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal number, noise
        number += 1
        if number not in calls:
            return output
        prediction = prediction_of(output)
        rows = len(prediction) // branches
        if number == calls.start:
            values = torch.randn((rows, *prediction.shape[1:]), generator=generator, dtype=torch.float32)
            scale = NOISE_SHARE * prediction.float().square().mean().sqrt().item()
            noise = (values * scale).to(prediction)
            added.append(float(noise.double().square().mean()))
        changed = prediction + torch.cat([noise] * branches)
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output.sample = changed
        return output

    with Hooks() as hooks:
        hooks.after(denoiser, hook)
        yield
