"""A contender that is saved for a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from edadm_cli.bench.contenders.full_precision import TorchFloat
from edadm_cli.bench.spec import Spec
from tests.unit.bench.stand_ins import CPU, preparation


@pytest.fixture
def saved(denoiser: nn.Module, tmp_path: Path) -> Spec:
    denoiser.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    return TorchFloat().prepare(preparation(denoiser, tmp_path, CPU, "bfloat16"))[0]
