"""Attention to codes on CUDA, on the shapes of Stable Diffusion and on odd ones, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edadm_kernels import attention_quantize, backend
from edadm_kernels.backend import uses_hopper
from edadm_kernels.hopper.attention import takes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HEADS = 8


def operands(
    queries: int, keys: int, width: int, dtype: torch.dtype = torch.float16, samples: int = 2, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of larger products, as a denoiser has them."""
    generator = torch.Generator("cuda").manual_seed(queries + keys)
    channels = HEADS * width
    q = spread * torch.randn(samples, queries, 3 * channels, generator=generator, device="cuda")
    pair = torch.randn(samples, keys, 2 * channels, generator=generator, device="cuda").to(dtype)
    return q.to(dtype)[..., :channels], pair[..., :channels], pair[..., channels:]


def codes_apart(
    qkv: tuple[Tensor, Tensor, Tensor], scale: float, out_scale: float, bits: int = 8, name: str | None = None
) -> Tensor:
    """How far the codes are from those of the reference, which takes a sample at a time."""
    out = (torch.tensor([out_scale], device="cuda"), torch.tensor([(1 << bits) // 2], dtype=torch.int32, device="cuda"))
    with backend("reference"):
        expected = torch.cat(
            [attention_quantize(*(x[i : i + 1] for x in qkv), HEADS, scale, *out, bits) for i in range(len(qkv[0]))]
        )
    if name is None:
        actual = attention_quantize(*qkv, HEADS, scale, *out, bits)
    else:
        with backend(name):  # type: ignore[arg-type]
            actual = attention_quantize(*qkv, HEADS, scale, *out, bits)
    return (actual.int() - expected.int()).abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(4096, 77, 40), (1024, 77, 80), (256, 256, 160), (64, 64, 160), (33, 5, 64)]
)
def test_in_triton(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    apart = codes_apart(operands(queries, keys, width, dtype), 1 / math.sqrt(width), 0.02, name="triton")
    assert apart.max() <= 1
    assert apart.float().mean() < (0.01 if dtype == torch.float16 else 0.05)


@pytest.mark.parametrize("samples", [1, 2, 16])
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [
        *((4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (1024, 77, 80), (256, 256, 160), (256, 77, 160)),
        *((64, 64, 160), (64, 77, 160), (1024, 1024, 64), (1024, 77, 64), (4096, 154, 64)),
        *((333, 205, 40), (1, 1, 8), (7, 81, 16), (65, 64, 24), (129, 65, 48), (257, 129, 72), (300, 300, 88)),
        *((511, 97, 96), (255, 193, 128), (63, 80, 136), (1000, 16, 32), (2, 1000, 56)),
    ],
)
def test_every_cut(queries: int, keys: int, width: int, samples: int) -> None:
    if samples == 16 and queries * keys > 1024 * 1024:
        pytest.skip("the reference takes long")
    apart = codes_apart(operands(queries, keys, width, samples=samples), 1 / math.sqrt(width), 0.3 / math.sqrt(keys))
    assert apart.max() <= 1
    assert apart.float().mean() < 0.012


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0])
@pytest.mark.parametrize(("queries", "keys", "width"), [(512, 512, 40), (512, 77, 40), (256, 256, 160), (512, 320, 80)])
def test_flat_and_sharp_weights(queries: int, keys: int, width: int, spread: float) -> None:
    apart = codes_apart(operands(queries, keys, width, spread=spread), 1 / math.sqrt(width), 0.02)
    assert apart.max() <= 1
    assert apart.float().mean() < 0.012


def test_scores_that_grow_from_turn_to_turn() -> None:
    """What the weights refer to has to follow: the last keys come first, and their scores are the smallest."""
    q, k, v = (x.contiguous() for x in operands(512, 1024, 40))
    q.fill_(1.0)
    k.copy_(torch.linspace(4.0, -4.0, 1024, device="cuda").view(1, -1, 1).expand_as(k))
    apart = codes_apart((q, k, v), 1.0, 0.02)
    assert apart.max() <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits(bits: int) -> None:
    apart = codes_apart(operands(300, 300, 40), 0.2, 0.1, bits)
    assert apart.max() <= 1
    assert apart.float().mean() < 0.012


def test_it_repeats() -> None:
    qkv, out = operands(1024, 1024, 80), (torch.tensor([0.01], device="cuda"), torch.tensor([9], device="cuda").int())
    first = attention_quantize(*qkv, HEADS, 0.1, *out)
    assert all(torch.equal(attention_quantize(*qkv, HEADS, 0.1, *out), first) for _ in range(5))


def test_what_stays_with_triton() -> None:
    q, k, v = operands(64, 64, 40)
    heads = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)]
    assert takes(*heads, 0.1) or not uses_hopper(q)
    assert not takes(*heads, -0.1)
    assert not takes(*(x.bfloat16() for x in heads), 0.1)
    shifted = torch.randn(2, 64, 3 * 320 + 1, device="cuda", dtype=torch.float16)[..., 1:321]
    assert not takes(shifted.unflatten(2, (HEADS, -1)).transpose(1, 2), *heads[1:], 0.1)
    for qkv in [(shifted, k, v), operands(64, 64, 12), operands(64, 64, 168)]:
        apart = codes_apart(qkv, 0.1, 0.02)
        assert apart.max() <= 1
