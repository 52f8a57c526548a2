"""Distances between images of the same seed."""

import math

import pytest
import torch

from edadm_cli.metrics.distances import num_identical, psnr, psnr_ceiling, relative_l2


def _images(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 200, (count, 3, 9, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("shift", [1, 5, 50])
def test_psnr_of_a_constant_shift_is_known(shift: int) -> None:
    images = _images(0)
    expected = 20 * math.log10(255 / shift)
    torch.testing.assert_close(psnr(images + shift, images), torch.full((3,), expected, dtype=torch.float64))


def test_psnr_is_symmetric_although_levels_are_unsigned() -> None:
    first, second = _images(1), _images(2)
    torch.testing.assert_close(psnr(first, second), psnr(second, first))


def test_equal_images_count_as_the_largest_finite_value_of_their_size() -> None:
    images = _images(3)
    changed = images.clone()
    changed[1, 0, 0, 0] += 1
    values = psnr(changed, images)
    ceiling = psnr_ceiling(3 * 9 * 7)
    torch.testing.assert_close(values, torch.full((3,), ceiling, dtype=torch.float64))
    assert num_identical(changed, images) == 2
    changed[1, 0, 0, 1] += 1
    assert psnr(changed, images)[1] < ceiling


def test_relative_l2_of_a_scaled_latent_is_the_scale() -> None:
    latents = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(4))
    factors = torch.tensor([1.0, 1.1, 0.5, 3.0]).view(4, 1, 1, 1)
    expected = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(relative_l2(latents * factors, latents), expected, atol=1e-6, rtol=1e-6)


def test_relative_l2_of_half_precision_latents_does_not_overflow() -> None:
    latents = torch.full((1, 4, 64, 64), 30000.0, dtype=torch.float16)
    assert relative_l2(latents, latents).item() == 0.0
    assert relative_l2(-latents, latents).item() == pytest.approx(2.0)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        psnr(_images(0, 3), _images(0, 2))
