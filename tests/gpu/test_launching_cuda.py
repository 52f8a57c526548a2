"""Kernels launched from other threads and on other devices than the current one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from edadm_kernels import attention_quantize, backend, group_norm_quantize, layer_norm_quantize, linear, quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def results(device: torch.device) -> list[torch.Tensor]:
    """What every kind of kernel gives for seeded inputs on a device."""
    generator = torch.Generator(device).manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float16)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)

    scale = torch.tensor([0.03], device=device)
    zero_point = torch.tensor([120], dtype=torch.int32, device=device)
    affine: Any = (torch.ones(320, device=device), torch.zeros(320, device=device))
    rows, image = floats(256, 320), floats(2, 32, 32, 320).permute(0, 3, 1, 2)
    correction = torch.zeros(320, dtype=torch.int32, device=device)
    return [
        linear(codes(256, 320), codes(320, 320), affine[0] * 1e-4, correction, affine[1]),
        quantize(rows, scale, zero_point),
        layer_norm_quantize(rows, *affine, 1e-5, scale, zero_point)[0],
        group_norm_quantize(image, *affine, 32, 1e-5, True, scale, zero_point)[0],
        attention_quantize(*(x[None] for x in (rows, rows, rows)), 8, 0.1, scale, zero_point),
    ]


def close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    apart = [(f.float() - w.float()).abs().max() for f, w in zip(actual, expected, strict=True)]
    return bool(apart[0] == 0 and max(apart[1:]) <= 1)


def expected(device: torch.device) -> list[torch.Tensor]:
    with backend("reference"):
        return results(device)


def test_a_thread_that_never_called_cuda_launches() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor(1) as pool:
        actual = pool.submit(results, device).result()
    assert close(actual, expected(device))


@torch.no_grad()
def test_calls_without_the_dispatcher_give_the_same_on_every_stream() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.enable_grad():  # through the dispatcher
        dispatched = results(device)
    assert all(torch.equal(a, b) for a, b in zip(results(device), dispatched, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = results(device)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(on_stream, dispatched, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    device = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    actual = results(device)
    assert torch.cuda.current_device() == 0
    assert all(result.device == device for result in actual)
    assert close(actual, expected(device))
