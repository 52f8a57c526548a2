"""One backward sweep over a recorded run gives the derivative of the final sample by every candidate of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from edadm_cli.models.pipeline_calls.recorded_sampling import NoGradientError, record_sampling
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.sensitivity.candidates import LayerCandidates
from edadm_cli.sensitivity.effects import measure_effects

FACTORS = ((0.9, 0.5), (0.8, -0.3), (1.1, 0.2))  # x <- a x + b prediction, step by step
IMAGES = 2


class Denoiser(nn.Module):
    """Convolutions, a linear layer on tokens, one that does not see the sample, and one with a row for all images."""

    def __init__(self, as_tuple: bool = True) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.grouped, self.tokens = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 8)
        self.time, self.shared = nn.Linear(4, 8), nn.Linear(4, 8)
        self.double().requires_grad_(False)

    def forward(self, sample: Tensor, time: Tensor) -> object:
        x = nn.functional.silu(self.first(sample)) + self.time(time)[:, :, None, None]
        x = nn.functional.silu(self.grouped(x)) + self.shared(torch.ones(1, 4).double())[:, :, None, None]
        x = self.tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, sample.shape[2:])
        prediction = self.last(torch.tanh(x))
        return (prediction,) if self.as_tuple else Transformer2DModelOutput(sample=prediction)


def _generate(denoiser: nn.Module, branches: int = 1, calls: int = 1, limit: float = 2.0) -> Tensor:
    """Samples with the rows of each branch in one call, or with one call per branch; clamps samples to a limit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, 3, 6, 6, generator=generator, dtype=torch.float64)
    for step, (a, b) in enumerate(FACTORS):
        rows = []
        for call in range(calls):
            sample = torch.cat([x] * (branches // calls))
            time = torch.full((len(sample), 4), step + 0.5 * call, dtype=torch.float64)
            output = denoiser(sample, time)
            rows.append(output[0] if isinstance(output, tuple) else output.sample)
        unconditional, conditional = torch.cat(rows).chunk(2) if branches == 2 else (rows[0], rows[0])
        x = (a * x + b * (unconditional + 5.0 * (conditional - unconditional))).clamp(-limit, limit)
    return x


def _candidates(denoiser: Denoiser) -> dict[str, LayerCandidates]:
    """Returns two random changes of each layer's weight."""
    candidates = {}
    for name, layer in denoiser.named_children():
        shape = layer.get_parameter("weight").shape
        changes = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        candidates[name] = LayerCandidates(layer, (2, 4), (), (), (), changes, LayerPlan(weight_bits=8), ())
    return candidates


@contextmanager
def _changed(layer: nn.Module, change: Tensor) -> Iterator[None]:
    weight = layer.get_parameter("weight")
    original = weight.clone()
    weight.copy_(original + change)
    try:
        yield
    finally:
        weight.copy_(original)


@pytest.mark.parametrize(("branches", "calls"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_the_effects_are_the_derivatives_of_the_final_sample(branches: int, calls: int, as_tuple: bool) -> None:
    torch.manual_seed(3)
    denoiser = Denoiser(as_tuple)
    candidates = _candidates(denoiser)
    recorded = record_sampling({"": denoiser}, lambda: _generate(denoiser, branches, calls))
    directions = torch.randn(3, *recorded.final.shape, dtype=torch.float64)
    effects = measure_effects(recorded, {"": denoiser}, {"": candidates}, directions, {"": len(FACTORS)}).layers[""]
    size = 1e-6
    for name, layer in candidates.items():
        for number, change in enumerate(layer.weight_changes):
            finals = []
            for sign in (1, -1):
                with _changed(layer.layer, sign * size * change):
                    finals.append(_generate(denoiser, branches, calls))
            derivative = (finals[0] - finals[1]) / (2 * size)
            expected = (directions * derivative).flatten(2).sum(2)  # [K, N]
            if name == "shared":  # each image gets an equal part of the sum, which has the same mean square
                expected = (expected.sum(1) / IMAGES**0.5).unsqueeze(1).expand(-1, IMAGES)
            assert torch.allclose(effects[name][:, number], expected, rtol=1e-4, atol=1e-5), name
    assert not denoiser._forward_hooks


@pytest.mark.parametrize(("branches", "calls"), [(1, 1), (2, 1), (2, 2)])
def test_gains_are_the_squares_of_the_samplers_factors(branches: int, calls: int) -> None:
    """Where the denoiser does not look at the sample, a change of a prediction is only passed on by the sampler."""
    torch.manual_seed(3)
    denoiser = Denoiser()
    denoiser.first.weight.zero_()
    recorded = record_sampling({"": denoiser}, lambda: _generate(denoiser, branches, calls, limit=1e9))
    directions = torch.randn(2, *recorded.final.shape, dtype=torch.float64)
    measured = measure_effects(recorded, {"": denoiser}, {"": _candidates(denoiser)}, directions, {"": len(FACTORS)})
    expected = [(0.5 * 0.8 * 1.1) ** 2, (0.3 * 1.1) ** 2, 0.2**2]
    assert measured.gains[""].T.tolist() == [pytest.approx(expected)] * IMAGES


def test_a_sampler_without_gradients_is_refused() -> None:
    denoiser = Denoiser()
    with pytest.raises(NoGradientError, match="no gradient"):
        record_sampling({"": denoiser}, lambda: _generate(denoiser).detach())
