"""The prediction in the output of a denoiser, whatever form the architecture gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from edadm_cli.models.denoiser_calls.predictions import prediction_of

ROWS = torch.arange(12.0).reshape(2, 3, 2)


@pytest.mark.parametrize(
    "output",
    [ROWS, (ROWS,), Transformer2DModelOutput(sample=ROWS), ([*ROWS],), Transformer2DModelOutput(sample=[*ROWS])],
    ids=["tensor", "tuple", "object", "tuple of a list", "object of a list"],
)
def test_the_rows_of_a_prediction_are_one_tensor(output: Any) -> None:
    assert torch.equal(prediction_of(output), ROWS)
