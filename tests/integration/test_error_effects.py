"""How far the errors of a denoiser move the final sample, against sampling with such an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.artifacts import RunFolder
from edadm_cli.hooks import Hooks
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls import backward_sweep
from edadm_cli.models.pipeline_calls.sampling import sample

COUNT = 2
FreshRun = Callable[[Path], RunFolder]


class Worse(nn.Module):
    """A denoiser with an error in its prediction."""

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale

    def forward(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> Any:
        output = self.denoiser(sample, timestep, **arguments)
        change = self.scale * (sample.cos() + float(timestep) / 100)
        return (output[0] + change,) if isinstance(output, tuple) else type(output)(sample=output.sample + change)


def _finals(model: LoadedModel, collected: CollectedRun, last: nn.Module | None = None) -> Tensor:
    """Samples in full precision, but for the last step with another denoiser if there is one."""
    sampling, calls = collected.sampling, []

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        calls.append(output)
        if last is None or len(calls) != sampling.num_steps:
            return output
        hooks.close()  # `last` calls the denoiser
        return last(*args, **kwargs)

    with Hooks() as hooks:
        hooks.after(model.denoiser, replace, with_kwargs=True)
        seeds, steps = sampling.seeds[:COUNT], sampling.num_steps
        return sample(model, seeds=seeds, prompts=None, num_steps=steps, guidance_scale=None).latents


def test_an_effect_is_how_far_an_error_moves_the_final_sample(
    tiny_ddpm: Path, fresh_run: FreshRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly so in the last step, but for the clipping of samples, along the way in which the final sample moves."""
    collected = CollectedRun.open(fresh_run(tiny_ddpm))
    model = collected.load(torch.device("cpu"), torch.float32)
    moved = _finals(model, collected, Worse(model.denoiser, 0.1)) - _finals(model, collected)
    sizes = moved.flatten(1).norm(dim=1)
    along = (moved / sizes.view(-1, 1, 1, 1)).expand(1, *moved.shape)
    monkeypatch.setattr(backward_sweep, "random_directions", lambda *_: along)
    effects, twice = (
        backward_sweep.error_effects(model, collected.sampling, "", Worse(model.denoiser, scale), COUNT, seed=0)
        for scale in (0.1, 0.2)
    )
    assert len(effects) == collected.num_steps
    assert float(effects[-1]) == pytest.approx(float(sizes.log().mean().exp()), rel=0.01)
    torch.testing.assert_close(twice, 2 * effects, rtol=1e-3, atol=0)
