"""Calls of loaded exports that wait for their launches are replayed as CUDA graphs, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.cuda import recording
from edadm_cli.engines.cuda.compiled.plain import placed_copy
from edadm_cli.engines.cuda.recording import WARM_UP, RecordedForward, waits_for_launches
from edadm_cli.engines.parity import relative_l2
from edadm_cli.integrations.deployment import make_ready
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from tests.denoisers.families import FAMILIES, quantized_denoiser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = torch.device("cuda")


def on_cuda(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, tree)


def scaled(x: Any, factor: float) -> Any:
    """Returns images and prompts times a factor, and everything else as it is."""
    return x * factor if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 else x


def recordings(model: nn.Module) -> int:
    forward = model.__dict__["forward"]
    assert isinstance(forward, RecordedForward)
    return sum(shape.recording is not None for shape in forward._shapes.values())


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_replays_compute_what_the_kernels_compute(family: str, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MIN_LAUNCH_SHARE", 0.0)
    denoiser, call = quantized_denoiser(family, bits)
    args, kwargs = on_cuda(call)
    model = placed_copy(denoiser, DEVICE, torch.float32)
    make_ready(model)
    expected, actual = [], []
    for step in range(WARM_UP + 5):
        some, named = torch.utils._pytree.tree_map(lambda x, k=step: scaled(x, 1 + 0.1 * k), (args, kwargs))
        expected.append(prediction_of(type(model).forward(model, *some, **named)))
        actual.append(prediction_of(model(*some, **named)))
    assert recordings(model) == 1
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_l2(ours, theirs) < 1e-5
    assert relative_l2(actual[-1], actual[-2]) > 1e-5, "outputs follow the inputs"


@torch.no_grad()
def test_a_denoiser_that_is_moved_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MIN_LAUNCH_SHARE", 0.0)
    denoiser, call = quantized_denoiser("dit", "w8a8")
    make_ready(denoiser)
    denoiser.to("cuda")
    args, kwargs = on_cuda(call)
    outputs = [prediction_of(denoiser(*args, **kwargs)) for _ in range(WARM_UP + 3)]
    assert recordings(denoiser) == 1
    denoiser.to("cpu")
    assert recordings(denoiser) == 0
    denoiser.to("cuda")
    outputs += [prediction_of(denoiser(*args, **kwargs)) for _ in range(WARM_UP + 3)]
    assert all(relative_l2(y, outputs[0]) < 1e-5 for y in outputs)


@torch.no_grad()
def test_only_launches_without_waiting_are_worth_a_graph() -> None:
    x, large = torch.ones(8, device=DEVICE), torch.ones(8192, 8192, device=DEVICE)

    def launches() -> None:
        for _ in range(500):
            x.add(1)

    def reads() -> None:
        launches()
        x.sum().item()

    def computes() -> None:
        for _ in range(8):
            large @ large

    calls: dict[Callable[[], None], bool] = {launches: True, reads: False, computes: False}
    for call, is_worth_it in calls.items():
        call()
        # beside other processes on the GPU, launches may take less than the whole of a call
        answers = [waits_for_launches(call, DEVICE)[1] for _ in range(10)]
        assert any(answers) == is_worth_it, call.__name__


@torch.no_grad()
def test_a_failed_recording_leaves_the_device_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + float(torch.randn((), device=x.device) * 0 + x.sum())

    said: list[str] = []
    monkeypatch.setattr(recording, "waits_for_launches", lambda call, device: (call(), True))
    monkeypatch.setattr(recording, "say_once", said.append)
    model, x = Reading().eval(), torch.ones(3, device=DEVICE)
    recording.record_calls(model)
    for _ in range(WARM_UP + 4):
        assert torch.equal(model(x), x + 3)
    assert len(said) == 1
    torch.cuda.synchronize()
    assert torch.randn(5, device=DEVICE).isfinite().all()
