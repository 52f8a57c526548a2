"""A random model is the same on every device."""

from __future__ import annotations

import pytest
import torch

from edadm_cli.models.random_numbers import fill_nearly_normal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_gpu_makes_the_numbers_of_a_cpu() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours, theirs = (torch.empty(300_001, dtype=dtype, device=device) for device in ("cpu", "cuda"))
        for out in (ours, theirs):
            fill_nearly_normal(out, 5, gain=0.03, mean=1.0)
        assert torch.equal(ours, theirs.cpu())
