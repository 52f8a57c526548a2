"""Calls of a loaded denoiser are recorded where nothing else has a say; a stand-in for a graph keeps old results."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_cli.engines.cuda import recording
from edadm_cli.engines.cuda.compiled.plain import build_plain
from edadm_cli.engines.cuda.recording import MAX_SHAPES, RECHECK, SWITCH, WARM_UP, RecordedForward
from edadm_cli.integrations import deployment
from tests.denoisers.families import quantized_denoiser

X = torch.arange(6.0).reshape(2, 3)


class Denoiser(nn.Module):
    """Its output depends on everything that a user may change between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.processor: Any = Processor()
        self.factor, self.weights, self.scales = 1.0, {"style": 1.0}, [1.0]
        self.runs = Runs()

    def forward(self, x: Tensor, timestep: Tensor | float, scale: float = 1.0) -> tuple[Tensor]:
        """Computes something."""
        self.runs.number += 1
        factor = self.factor * self.weights["style"] * self.scales[0] * self.processor.scale * scale
        return (self.layer(x) * factor + timestep,)


class Processor:
    def __init__(self) -> None:
        self.scale = 1.0


class Runs:
    """Counts in an object of its own, so that the attributes of the module stay as they are."""

    number = 0


class Recorded:
    """Returns what the recorded call returned, whatever has changed since."""

    made: list[Recorded]

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any, memory: Any, warm_up: int) -> None:
        args, kwargs = recording.pytree.tree_unflatten(leaves, spec)
        self.outputs = function(*args, **kwargs)
        self.made.append(self)

    def replay(self, leaves: list[Any]) -> Any:
        return self.outputs


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Lets calls on a CPU be recorded, without gradients; returns the recordings."""
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(RecordedForward, "device_type", "cpu")
    monkeypatch.setattr(recording, "Recording", Recorded)
    monkeypatch.setattr(recording, "on_default_stream", lambda device: True)
    monkeypatch.setattr(recording, "has_room", lambda device: True)
    monkeypatch.setattr(recording, "waits_for_launches", lambda call, device: (call(), True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with torch.no_grad():
        yield Recorded.made


def recorded() -> Denoiser:
    model = Denoiser().eval()
    recording.record_calls(model)
    return model


def call(model: nn.Module, times: int = WARM_UP + 3) -> Tensor:
    outputs = [model(X, torch.ones(()))[0] for _ in range(times)]
    return outputs[-1]


def expected(model: nn.Module) -> Tensor:
    y: Tensor = type(model).forward(model, X, torch.ones(()))[0]
    return y


def test_a_call_is_recorded_after_it_was_observed(made: list[Recorded]) -> None:
    model = recorded()
    call(model, WARM_UP + 1)
    assert not made
    actual = call(model, 10)
    assert len(made) == 1
    assert model.runs.number == WARM_UP + 2, "replays run no Python"
    assert torch.equal(actual, expected(model))


def test_each_shape_and_each_constant_is_recorded_once(made: list[Recorded]) -> None:
    model = recorded()
    for rows, scale in [(1, 1.0), (2, 1.0), (2, 0.5)] * (WARM_UP + 3):
        actual = model(X[:rows], torch.ones(()), scale=scale)[0]
        assert torch.equal(actual, Denoiser.forward(model, X[:rows], torch.ones(()), scale)[0])
    assert len(made) == 3


def exchange(model: Denoiser) -> None:
    model.layer = nn.Linear(3, 3)


def move(model: Denoiser) -> None:
    model.layer.weight.data = 2 * model.layer.weight.data


def set_factor(model: Denoiser) -> None:
    model.factor = 3.0


def weight_adapter(model: Denoiser) -> None:
    model.weights["style"] = 0.5


def set_item(model: Denoiser) -> None:
    model.scales[0] = 0.25


def set_processor(model: Denoiser) -> None:
    model.processor.scale = 7.0


def hook(model: Denoiser) -> None:
    model.layer.register_forward_hook(lambda module, args, output: output + 1)


def hook_before(model: Denoiser) -> None:
    model.layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@pytest.mark.parametrize(
    "change", [exchange, move, set_factor, weight_adapter, set_item, set_processor, hook, hook_before]
)
def test_a_change_has_its_effect_at_once(change: Callable[[Denoiser], None], made: list[Recorded]) -> None:
    model = recorded()
    call(model)
    assert len(made) == 1
    change(model)
    for _ in range(WARM_UP + 3):
        assert torch.equal(call(model, 1), expected(model))


def compile_child(model: Denoiser) -> None:
    model.layer.compile(backend="eager")


def offload(model: Denoiser) -> None:
    model.layer._hf_hook = object()  # type: ignore[assignment]


def train(model: Denoiser) -> None:
    model.train()


@pytest.mark.parametrize("change", [hook, hook_before, compile_child, offload, train])
def test_hooked_offloaded_compiled_or_trained_modules_are_not_recorded(
    change: Callable[[Denoiser], None], made: list[Recorded]
) -> None:
    model = recorded()
    change(model)
    call(model)
    assert not made


@pytest.mark.parametrize("change", [hook, hook_before, compile_child, offload])
def test_modules_that_are_hooked_after_a_call_was_observed_are_not_recorded(
    change: Callable[[Denoiser], None], made: list[Recorded]
) -> None:
    model = recorded()
    call(model, WARM_UP + 1)
    change(model)
    assert torch.equal(call(model), expected(model))
    assert not made


class Forwarding(DiffusersHook):
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Calls what the hook replaces."""
        return self.fn_ref.original_forward(*args, **kwargs)


def hook_for_a_while(model: Denoiser) -> Callable[[], None]:
    return model.layer.register_forward_hook(lambda module, args, output: output + 1).remove


def offload_for_a_while(model: Denoiser) -> Callable[[], None]:
    add_hook_to_module(model.layer, ModelHook())
    return lambda: remove_hook_from_module(model.layer)  # type: ignore[return-value]


def cache_for_a_while(model: Denoiser) -> Callable[[], None]:
    registry = HookRegistry.check_if_exists_or_initialize(model.layer)
    registry.register_hook(Forwarding(), "forwarding")
    return lambda: registry.remove_hook("forwarding")


@pytest.mark.parametrize("calls_before", [0, WARM_UP + 1, WARM_UP + 3])
@pytest.mark.parametrize("change", [hook_for_a_while, offload_for_a_while, cache_for_a_while])
def test_calls_are_recorded_when_hooks_are_gone(
    change: Callable[[Denoiser], Callable[[], None]], calls_before: int, made: list[Recorded]
) -> None:
    model = recorded()
    if calls_before:
        call(model, calls_before)
    made.clear()
    remove = change(model)
    assert torch.equal(call(model, 2 * RECHECK), expected(model))
    assert not made
    remove()
    assert torch.equal(call(model, RECHECK + WARM_UP + 3), expected(model))
    assert len(made) == 1
    runs = model.runs.number
    call(model)
    assert model.runs.number == runs, "replays run no Python"


def test_an_empty_registry_of_hooks_is_no_hook(made: list[Recorded]) -> None:
    model = recorded()
    HookRegistry.check_if_exists_or_initialize(model)  # as pipelines do that name their calls for step caches
    call(model)
    assert made


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.profiler.profile, Mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_gradients_profilers_modes_and_autocast_see_the_kernels(
    context: Callable[[], AbstractContextManager[object]], made: list[Recorded]
) -> None:
    model = recorded()
    with context():
        call(model)
    assert not made
    call(model)
    assert made


def test_a_forward_that_changes_its_module_is_not_recorded(made: list[Recorded]) -> None:
    class Counting(Denoiser):
        def forward(self, x: Tensor, timestep: Tensor | float, scale: float = 1.0) -> tuple[Tensor]:
            self.factor += 1
            return super().forward(x, timestep, scale)

    model = Counting().eval()
    recording.record_calls(model)
    first = call(model, 1)
    assert not torch.equal(call(model), first)
    assert not made


def test_a_call_that_keeps_the_gpu_busy_is_not_recorded(monkeypatch: pytest.MonkeyPatch, made: list[Recorded]) -> None:
    monkeypatch.setattr(recording, "waits_for_launches", lambda call, device: (call(), False))
    call(recorded(), 10)
    assert not made


def test_numbers_that_never_repeat_are_not_recorded_and_take_no_memory(made: list[Recorded]) -> None:
    model = recorded()
    for step in range(3 * MAX_SHAPES):
        assert torch.equal(model(X, float(step))[0], Denoiser.forward(model, X, float(step))[0])
    assert not made
    assert len(model.forward._shapes) <= MAX_SHAPES  # type: ignore[attr-defined]


def test_arguments_that_are_not_plain_are_not_recorded(made: list[Recorded]) -> None:
    model = recorded()
    call(model)
    made.clear()
    for _ in range(WARM_UP + 3):
        model(X, nn.Parameter(torch.ones(())))
    assert not made


def test_a_failure_to_record_is_said_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, made: list[Recorded]
) -> None:
    said: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    repaired: list[torch.device] = []
    monkeypatch.setattr(recording, "Recording", fail)
    monkeypatch.setattr(recording, "say_once", said.append)
    monkeypatch.setattr(recording, "_repair_random_numbers", repaired.append)
    model = recorded()
    for _ in range(3):
        assert torch.equal(call(model), expected(model))
    assert said == [
        "Calls of Denoiser are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert repaired == [X.device]


def test_too_little_memory_frees_the_graphs(monkeypatch: pytest.MonkeyPatch, made: list[Recorded]) -> None:
    monkeypatch.setattr(recording, "has_room", lambda device: False)
    model = recorded()
    assert torch.equal(call(model, 10), expected(model))
    assert len(made) == 1
    assert not model.forward._shapes  # type: ignore[attr-defined]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_weights(duplicate: Callable[[Denoiser], Denoiser], made: list[Recorded]) -> None:
    model = recorded()
    call(model)
    twin = duplicate(model)
    assert torch.equal(call(twin), expected(model))
    twin.layer.weight.data = torch.zeros(3, 3)
    assert torch.equal(call(twin), expected(twin))
    assert len(made) == 3


def test_the_signature_is_that_of_the_class() -> None:
    assert inspect.signature(recorded().forward) == inspect.signature(Denoiser().forward)


class Plain(nn.Module):
    """A denoiser that torch compiles whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        """Computes something."""
        return (self.layer(x) + timestep,)


def test_torch_compiles_the_denoiser_in_one_graph(made: list[Recorded]) -> None:
    model = Plain().eval()
    recording.record_calls(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(call(compiled), expected(model))
    assert not made
    assert torch.equal(call(model), expected(model))
    assert made


def warned(*messages: str) -> int:
    with recording._waits() as waits:
        for message in messages:
            warnings.warn(message, stacklevel=1)
    return len(waits)


def test_warnings_of_waiting_operations_are_found_and_others_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning, match="^another$"):
        assert warned("called a synchronizing CUDA operation (Triggered internally)", "another") == 1
    assert modes == ["warn", 0]


def test_loaded_exports_are_recorded_on_a_gpu_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, _ = quantized_denoiser("dit", "w8a8")
    deployment.make_ready(denoiser)
    assert "forward" not in denoiser.__dict__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(SWITCH, "0")
    deployment.make_ready(denoiser)
    assert "forward" not in denoiser.__dict__
    monkeypatch.delenv(SWITCH)
    deployment.make_ready(denoiser)
    assert isinstance(denoiser.forward, RecordedForward)
    model, _ = build_plain(denoiser, torch.device("cpu"), torch.float32)
    assert "forward" not in model.__dict__, "the engine records what it builds"


def test_moving_a_loaded_denoiser_frees_its_graphs(made: list[Recorded]) -> None:
    denoiser, (args, kwargs) = quantized_denoiser("dit", "w8a8")
    deployment.make_ready(denoiser)
    recording.record_calls(denoiser)
    for _ in range(WARM_UP + 2):
        denoiser(*args, **kwargs)
    assert len(made) == 1
    denoiser.to("cpu")
    assert not denoiser.forward._shapes  # type: ignore[union-attr]


def test_hooks_of_accelerate_and_diffusers_wrap_a_recorded_denoiser(made: list[Recorded]) -> None:
    denoiser, (args, kwargs) = quantized_denoiser("dit", "w8a8")
    recording.record_calls(denoiser)
    outputs = [denoiser(*args, **kwargs)]
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(Forwarding(), "forwarding")
    outputs += [denoiser(*args, **kwargs) for _ in range(WARM_UP + 2)]
    registry.remove_hook("forwarding")
    add_hook_to_module(denoiser, ModelHook())
    outputs += [denoiser(*args, **kwargs) for _ in range(WARM_UP + 2)]
    remove_hook_from_module(denoiser)
    assert not made
    assert isinstance(denoiser.forward, RecordedForward)
    assert all(torch.equal(y[0], outputs[0][0]) for y in outputs)


def test_adapters_have_their_effect_at_once(made: list[Recorded]) -> None:
    denoiser, (args, kwargs) = quantized_denoiser("sd3", "w8a8")
    deployment.make_ready(denoiser)
    recording.record_calls(denoiser)
    adapted: Any = denoiser
    changes: list[Callable[[], None]] = [
        lambda: None,
        lambda: adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style"),
        lambda: adapted.set_adapters(["style"], [0.3]),
        adapted.disable_lora,
        adapted.enable_lora,
        lambda: adapted.delete_adapters("style"),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        for _ in range(WARM_UP + 3):
            assert torch.equal(denoiser(*args, **kwargs)[0], type(denoiser).forward(denoiser, *args, **kwargs)[0])
        assert len(made) == number
