"""What unit tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn


@pytest.fixture
def denoiser(tiny_sd: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    unet.eval().requires_grad_(False)
    assert isinstance(unet, nn.Module)
    return unet
