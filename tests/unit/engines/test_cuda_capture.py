"""A step is recorded once per set of shapes; stand-ins for CUDA's graphs run the recorded call again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine, capture
from edadm_cli.engines.cuda.capture import WARM_UP, GraphedFunction, GraphMemory
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.reference import ReferenceEngine

Call = tuple[tuple[Any, ...], dict[str, Any]]
CPU = EngineOptions(device=torch.device("cpu"))


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


class FakeGraph:
    """Replays by computing again from the input buffers into the outputs of the recording."""

    compute: Callable[[], None]

    def replay(self) -> None:
        self.compute()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.cuda` record on a CPU."""
    recording = capture.Recording

    @contextmanager
    def graph(_: FakeGraph, pool: Any) -> Iterator[None]:
        assert pool == "pool"
        yield

    class Recording(recording):  # type: ignore[misc,valid-type]
        def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any, pool: Any) -> None:
            super().__init__(function, leaves, spec, pool)

            def compute() -> None:
                args, kwargs = capture.pytree.tree_unflatten(self._inputs, spec)
                for kept, new in zip(self._outputs, capture.pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                    kept.copy_(new)

            self._graph.compute = compute

    monkeypatch.setattr(capture, "Recording", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")


@pytest.mark.usefixtures("graphs")
def test_each_set_of_shapes_and_constants_is_recorded_once() -> None:
    runs: list[int] = []

    def function(x: Tensor, factor: float, extra: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        runs.append(1)
        return {"y": x * factor + (0 if extra is None else extra["z"])}

    graphed = GraphedFunction(function)
    assert torch.equal(graphed(torch.ones(2), 3.0)["y"], torch.full((2,), 3.0))
    recorded = len(runs)
    assert recorded == WARM_UP + 2, "warm-up, the recording, and a replay"
    assert torch.equal(graphed(torch.full((2,), 2.0), 3.0)["y"], torch.full((2,), 6.0))
    assert len(runs) == recorded + 1
    assert torch.equal(graphed(torch.ones(2), 4.0)["y"], torch.full((2,), 4.0))
    assert graphed(torch.ones(3), 3.0)["y"].shape == (3,)
    assert torch.equal(graphed(torch.ones(2), 3.0, {"z": torch.ones(2)})["y"], torch.full((2,), 4.0))
    assert torch.equal(graphed(torch.ones(2), 3.0)["y"], torch.full((2,), 3.0)), "the first recording is still there"


@pytest.mark.usefixtures("graphs")
def test_a_result_outlives_the_next_call() -> None:
    graphed = GraphedFunction(lambda x: x + 1)
    first = graphed(torch.zeros(2))
    graphed(torch.ones(2))
    assert torch.equal(first, torch.ones(2))


@pytest.mark.usefixtures("graphs")
def test_functions_that_share_their_memory_keep_their_results_and_read_their_inputs() -> None:
    """A first-block cache holds a block's residual while the graphs of other blocks and later steps run."""
    memory = GraphMemory()
    first, second = (GraphedFunction(function, memory) for function in (lambda x: x + 1, lambda x: x * 10))
    held = first(torch.zeros(2))
    assert torch.equal(second(held), torch.full((2,), 10.0))
    assert torch.equal(first(torch.full((2,), 4.0)), torch.full((2,), 5.0)), "the buffer had the other's input"
    assert torch.equal(held, torch.ones(2))


@pytest.mark.usefixtures("graphs")
def test_constants_of_other_types_are_recorded_apart() -> None:
    graphed = GraphedFunction(lambda x, factor: x * factor)
    x = torch.arange(2)
    assert graphed(x, 1).dtype == torch.int64
    assert graphed(x, 1.0).dtype == torch.float32


@pytest.mark.usefixtures("graphs")
def test_a_recorded_step_follows_sample_timestep_and_prompt(quantized: nn.Module, call: Call) -> None:
    compiled = CudaEngine(cuda_graphs=False).compile(quantized, *call, CPU)
    assert isinstance(compiled, CudaDenoiser)
    recorded = CudaDenoiser(compiled.model, compiled.layers, compiled._state, CPU, cuda_graphs=True)
    (sample, timestep), kwargs = call
    prompt = kwargs["encoder_hidden_states"]
    steps = [
        (sample, timestep, prompt),
        (sample * 0.5, timestep, prompt),
        (sample, timestep + 400, prompt),
        (sample, timestep, prompt.flip(1)),
        (torch.cat((sample, -sample)), timestep, torch.cat((prompt, prompt * 0.5))),
        (sample, timestep, prompt),
    ]
    for x, t, states in steps:
        actual = recorded(x, t, encoder_hidden_states=states).sample
        assert torch.equal(actual, compiled.call_eagerly(x, t, encoder_hidden_states=states).sample)
    exact = ReferenceEngine().compile(quantized, *call, CPU)(*call[0], **call[1]).sample
    assert (actual - exact).norm() < 1e-3 * exact.norm()
