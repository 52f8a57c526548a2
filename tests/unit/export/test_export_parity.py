"""What may differ between an export and the reconstruction that it was made from."""

from __future__ import annotations

import pytest
import torch

from edadm_cli.errors import EdadmError
from edadm_cli.export.parity import compare
from edadm_cli.models.pipeline_calls.sampling import Samples

IMAGES = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)


def test_equal_images_and_latents_within_rounding_are_the_same() -> None:
    before = Samples(IMAGES, torch.full((1, 4), 3.0))
    close, far = (Samples(IMAGES, before.latents + change) for change in (1e-6, 1e-3))
    assert compare(before, close, None, {"layer": 0.0}).latent_max_abs > 0
    with pytest.raises(EdadmError, match="does not compute what was reconstructed"):
        compare(before, far, None, {"layer": 0.0})
    with pytest.raises(EdadmError, match="latents differ by 0, pixels by 1 of 255"):
        compare(before, Samples(IMAGES + 1, before.latents), None, {"layer": 0.0})
    assert not compare(before, Samples(IMAGES + 1, close.latents), None, {"layer": 0.0}).images_bit_equal
    with pytest.raises(EdadmError, match="pixels by 2 of 255"):
        compare(before, Samples(IMAGES + 2, close.latents), None, {"layer": 0.0})


def test_nan_is_no_rounding() -> None:
    """NaN latents decode to equal images, and NaN is not larger than any bound."""
    broken = Samples(IMAGES, torch.full((1, 4), float("nan")))
    with pytest.raises(EdadmError, match="final latents differ by nan, pixels by 0 of 255"):
        compare(broken, broken, None, {"layer": 0.0})
    whole = Samples(IMAGES, torch.ones(1, 4))
    with pytest.raises(EdadmError, match="'broken' differs by nan"):
        compare(whole, whole, None, {"layer": 0.0, "broken": float("nan"), "other": 1e-9})
