"""Heads of text and image on a GPU, in the sizes of FLUX and Stable Diffusion 3.5: float32 rounded once to 16 bits."""

from __future__ import annotations

import pytest
import torch

from edadm_kernels import join_heads, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads", "width", "norm", "rotates"),
    [
        ((512, 1024), 24, 128, True, True),
        ((1536,), 24, 128, True, True),
        ((1024, 333), 24, 64, True, False),
        ((1024, 333), 24, 64, False, False),
        ((7, 3), 2, 16, True, True),
    ],
)
def test_heads_equal_the_reference(
    lengths: tuple[int, ...], heads: int, width: int, norm: bool, rotates: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    pieces = [torch.randn(2, n, heads * width, generator=generator, device=CUDA).to(dtype) for n in lengths]
    weights = [torch.randn(width, generator=generator, device=CUDA).to(dtype) for _ in pieces] if norm else []
    angles = torch.randn(sum(lengths), width // 2, generator=generator, device=CUDA).repeat_interleave(2, dim=1)
    rotation = (angles.cos(), angles.sin()) if rotates else (None, None)
    arguments = (pieces[0], pieces[1] if len(pieces) > 1 else None, heads, weights, 1e-6, *rotation)
    ulp = torch.finfo(dtype).eps  # half of it from the rounding, the rest from float32's sums
    torch.testing.assert_close(join_heads(*arguments), reference.join_heads(*arguments), rtol=ulp, atol=ulp / 16)
