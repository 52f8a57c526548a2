"""Attention to codes on CUDA, on the shapes of Stable Diffusion 1.x, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from edadm_kernels import attention_quantize, backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(4096, 77, 40), (1024, 77, 80), (256, 256, 160), (64, 64, 160), (33, 5, 64)]
)
def test_attention(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(queries)
    q = torch.randn(2, queries, 3 * 8 * width, generator=generator, device="cuda").to(dtype)[..., : 8 * width]
    pair = torch.randn(2, keys, 2 * 8 * width, generator=generator, device="cuda").to(dtype)
    scale, zero_point = torch.tensor([0.02], device="cuda"), torch.tensor([128], dtype=torch.int32, device="cuda")
    k, v = pair.chunk(2, dim=-1)
    arguments = (q, k, v, 8, 1 / math.sqrt(width), scale, zero_point, 8)
    with backend("reference"):
        wanted = attention_quantize(*arguments)
    found = attention_quantize(*arguments)
    apart = (found.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < (0.01 if dtype == torch.float16 else 0.05)
