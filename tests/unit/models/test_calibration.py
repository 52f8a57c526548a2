"""The calibration set gives the calls that were recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edadm_cli.models.denoiser_calls.calibration import CalibrationSet

TEMPLATE: dict[str, Any] = {
    "args": [{"$sample": None}, {"$timestep": None}],
    "kwargs": {
        "text": {"$tensor": "text"},
        "more": {"ids": {"$tensor": "more.ids"}},
        "grid": {"$tensor": "grid"},
    },
    "constants": ["grid"],
    "dtypes": {"text": "bfloat16", "more.ids": "int64", "grid": "float32"},
}


def calibration_set(branches: int) -> CalibrationSet:
    text, ids = torch.arange(8.0).reshape(4, 2), torch.arange(4)
    return CalibrationSet(
        sample=torch.arange(4.0).reshape(4, 1, 1, 1),
        timestep=torch.tensor([9, 7, 5, 3]),
        step_index=torch.tensor([0, 1, 2, 3]),
        trajectory_index=torch.tensor([3, 1, 0, 2]),
        condition={"text": text, "more.ids": ids},
        unconditional={"text": -text - 1, "more.ids": ids + 100} if branches == 2 else {},
        constants={"grid": torch.tensor([0.5])},
        template=TEMPLATE,
        branches=branches,
        collected_in="bfloat16",
    )


def test_rows_are_those_of_the_indices_with_the_unconditional_branch_first() -> None:
    args, kwargs = calibration_set(2).call(torch.tensor([2, 0]), "cpu", torch.float32)
    assert args[0].flatten().tolist() == [2, 0, 2, 0]
    assert args[1].tolist() == [5, 9, 5, 9]
    assert kwargs["text"].tolist() == [[-5, -6], [-1, -2], [4, 5], [0, 1]]
    assert kwargs["more"]["ids"].tolist() == [102, 100, 2, 0]


def test_without_guidance_there_is_one_row_a_sample() -> None:
    args, kwargs = calibration_set(1).call(range(1, 4), "cpu", torch.float32)
    assert args[0].flatten().tolist() == [1, 2, 3]
    assert kwargs["text"].shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_what_had_the_denoisers_dtype_takes_the_new_one(dtype: torch.dtype) -> None:
    args, kwargs = calibration_set(2).call([0], "cpu", dtype)
    assert args[0].dtype == kwargs["text"].dtype == dtype
    assert args[1].dtype == kwargs["more"]["ids"].dtype == torch.int64
    assert kwargs["grid"].dtype == torch.float32


def test_its_length_is_the_number_of_samples() -> None:
    assert len(calibration_set(2)) == 4
