"""The gain of a step is the square of the factor by which the sampler hands an error on to the final sample."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.sensitivity.gains import measure_gains

FACTORS = ((0.9, 0.5), (0.8, -0.3), (1.1, 0.2))  # x <- a x + b prediction, step by step


class Constant(nn.Module):
    """Predicts ones whatever the sample is, as a tuple or in an object."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, sample: Tensor) -> object:
        prediction = torch.ones_like(sample)
        return (prediction,) if self.as_tuple else Transformer2DModelOutput(sample=prediction)


def _generate(denoiser: nn.Module, branches: int, calls: int = 1) -> Tensor:
    """Samples with the rows of each branch in one call, or with one call per branch if `calls` is 2."""
    x = torch.ones(2, 3, 8, 8)
    for a, b in FACTORS:
        outputs = [denoiser(torch.cat([x] * (branches // calls or 1))) for _ in range(calls)]
        rows = torch.cat([output[0] if isinstance(output, tuple) else output.sample for output in outputs])
        unconditional, conditional = rows.chunk(2) if branches == 2 else (rows, rows)
        x = a * x + b * (unconditional + 5.0 * (conditional - unconditional))
    return x


@pytest.mark.parametrize(("branches", "calls"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_gains_are_the_squares_of_the_samplers_factors(branches: int, calls: int, as_tuple: bool) -> None:
    denoiser = Constant(as_tuple)
    runs: list[int] = []
    measured = measure_gains(denoiser, lambda: _generate(denoiser, branches, calls), 3, branches, 0, runs.append)
    expected = [(0.5 * 0.8 * 1.1) ** 2, (0.3 * 1.1) ** 2, 0.2**2]
    assert measured.gains.tolist() == pytest.approx(expected, rel=1e-4)
    assert measured.final_energy == pytest.approx(float(_generate(denoiser, 1).square().mean()))
    assert len(runs) == 4
    assert not denoiser._forward_hooks


def test_steps_with_different_numbers_of_calls_are_refused() -> None:
    denoiser = Constant(as_tuple=True)
    with pytest.raises(InputError, match="calls the denoiser 3 times in 2 steps") as error:
        measure_gains(denoiser, lambda: _generate(denoiser, 1), 2, 1, 0)
    assert error.value.hint.startswith("edadm reconstruct")
