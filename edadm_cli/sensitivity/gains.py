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

from edadm_cli.hooks import Hooks

NOISE_SHARE = 0.05
"""Root mean square of the added noise as a share of the prediction's."""


@dataclass(frozen=True)
class StepGains:
    """The effect of an error of the prediction at each step on the final sample.

    Attributes:
        gains: g_t of each denoiser call of the sampler, with shape `(T,)`: squared error of the final sample per
            squared error of the prediction.
        final_energy: Mean square of the final sample at full precision.
    """

    gains: Tensor
    final_energy: float


def measure_gains(
    denoiser: nn.Module,
    generate: Callable[[], Tensor],
    num_calls: int,
    branches: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> StepGains:
    """Measures the gain of each step with `num_calls + 1` runs of the sampler.

    Args:
        denoiser: The full-precision denoiser that `generate` calls.
        generate: Samples the same images every time; returns the final latents, with shape `(N, *)`.
        num_calls: T, denoiser calls per run.
        branches: 2 if a call holds both branches of guidance, else 1. Both get the same noise, so that the guided
            prediction changes by exactly that noise.
        seed: Seed of the noise.
        advance: Progress callback, called with 1 after each run.
    """
    final = generate()
    advance(1)
    gains = torch.zeros(num_calls, dtype=torch.float64)
    for index in range(num_calls):
        added: list[float] = []
        with _noise_at_call(denoiser, index, branches, seed, added):
            changed = generate()
        gains[index] = (changed - final).double().square().mean() / max(added[0], 1e-30)
        advance(1)
    return StepGains(gains, float(final.double().square().mean()))


@contextmanager
def _noise_at_call(denoiser: nn.Module, call: int, branches: int, seed: int, added: list[float]) -> Iterator[None]:
    """Adds noise to the denoiser's output in its call number `call`; `added` receives the mean square of the noise."""
    generator = torch.Generator().manual_seed(seed + call)
    number = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal number
        number += 1
        if number - 1 != call:
            return output
        prediction = prediction_of(output)
        rows = len(prediction) // branches
        noise = torch.randn((rows, *prediction.shape[1:]), generator=generator, dtype=torch.float32)
        scale = NOISE_SHARE * prediction.float().square().mean().sqrt().item()
        noise = (noise * scale).to(prediction)
        added.append(float(noise.double().square().mean()))
        changed = prediction + torch.cat([noise] * branches)
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output.sample = changed
        return output

    with Hooks() as hooks:
        hooks.after(denoiser, hook)
        yield


def prediction_of(output: Any) -> Tensor:
    """Returns the prediction in a denoiser's output: the first entry of a tuple, or `.sample`."""
    prediction = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(prediction, Tensor)
    return prediction
