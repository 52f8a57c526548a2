"""ERNIE-Image is calibrated with rows first, and predicts what diffusers predicts."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from edadm_cli.models.families import prepare_calls
from tests.denoisers.further import ernie


@pytest.mark.parametrize("size", [(4, 4), (2, 6)])
def test_a_prepared_denoiser_predicts_the_same_and_its_blocks_have_rows_first(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    denoiser = ernie().transformer.eval()
    call = {
        "hidden_states": torch.randn(3, 16, *size),
        "timestep": torch.tensor([900.0, 500.0, 10.0]),
        "text_bth": torch.randn(3, 7, 32),
        "text_lens": torch.tensor([7, 2, 5]),
    }
    prepared = deepcopy(denoiser)
    prepare_calls(prepared)
    prepare_calls(prepared)
    shapes = []
    prepared.layers[1].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad():
        expected, actual = denoiser(**call), prepared(**call)
    assert shapes == [(3, size[0] * size[1] + 7, 32)]
    assert type(actual) is type(expected)
    assert torch.allclose(actual.sample, expected.sample, atol=1e-6)
    assert expected.sample.std() > 0.01
