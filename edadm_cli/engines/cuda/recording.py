"""Replays calls of a loaded denoiser as CUDA graphs where Python launches kernels more slowly than a GPU runs them.

The first calls of a shape run without a graph. Then one call is observed: a graph is recorded only if the launches take
about as long as the whole call, if nothing waits for the GPU inside of the call, and if the call leaves the modules as
they were. Before each replay, the modules are compared with those that were recorded (`ModuleState`). So adapters,
moved weights, hooks and exchanged modules have their effect: the graphs are freed, and the next calls run without one.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edadm_cli.engines.cuda.capture import GraphMemory, Recording, signature
from edadm_cli.engines.cuda.module_state import ModuleState, is_special
from edadm_cli.integrations.notices import say_once

SWITCH = "EDADM_CUDA_GRAPHS"
"""The environment variable that turns this off if it is 0."""
WARM_UP = 2
"""The number of calls of a shape before one is observed: kernels are compiled in them."""
RECHECK = 8
"""The number of calls of a shape with hooked, offloaded or compiled modules after which these are looked for again."""
MAX_SHAPES = 8
"""The largest number of shapes that are followed; calls of further ones run without a graph."""
MIN_LAUNCH_SHARE = 0.8
"""The least share of a call's time that its launches take, from which on a graph is recorded."""
MIN_FREE_SHARE = 0.1
"""The least share of the GPU's memory that stays free beside the graphs."""

_CONSTANTS = (bool, int, float, str, type(None))
_SYNCHRONIZES = "called a synchronizing CUDA operation"  # from torch's warning


def record_calls(model: nn.Module) -> None:
    """Makes calls of a loaded denoiser replay CUDA graphs where that is faster; results are the same."""
    if os.environ.get(SWITCH, "1") != "0":
        model.forward = RecordedForward(model)


def leave_unrecorded(model: nn.Module) -> None:
    """Gives a denoiser the `forward` of its class back, for good."""
    if isinstance(model.__dict__.get("forward"), RecordedForward):
        del model.forward


@dataclass
class _Shape:
    """Calls with equal signatures.

    Attributes:
        calls: Their number.
        is_left: Whether they are left as they are, for good.
        is_special: Whether they are left as they are for as long as a module is hooked, offloaded or compiled.
        recording: Their graph.
    """

    calls: int = 0
    is_left: bool = False
    is_special: bool = False
    recording: Recording | None = None


class RecordedForward:
    """The `forward` of a denoiser, which replays CUDA graphs of calls that wait for their launches.

    Under `torch.compile`, with gradients, autocast, a profiler, hooks or offloading, a call is that of the class.

    Args:
        module: The denoiser.
    """

    device_type = "cuda"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._lock = threading.Lock()
        self.forget()

    @property
    def __signature__(self) -> inspect.Signature:
        forward: Any = type(self.module).forward
        return inspect.signature(forward.__get__(self.module))

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedForward:
        """Returns the `forward` of the module's copy, without graphs, which read the weights of the original."""
        return type(self)(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the denoiser's own `forward` returns."""
        if torch.compiler.is_compiling() or not self._is_plain() or not self._lock.acquire(blocking=False):
            return self._forward(*args, **kwargs)
        try:
            return self._call(args, kwargs)
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Frees all graphs and their memory; calls are observed anew."""
        self._shapes: dict[Any, _Shape] = {}
        self._memory: GraphMemory | None = None
        self._state: ModuleState | None = None
        self._gives_up = False

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _is_plain(self) -> bool:
        """Returns whether a call depends on its arguments and the modules alone, and nothing else watches it."""
        return not (
            self._gives_up
            or torch.is_grad_enabled()
            or self.module.training
            or torch.is_autocast_enabled(self.device_type)
            or torch.autograd._profiler_enabled()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or nn.modules.module._has_any_global_hook()
        )

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        shape = self._shape_of(leaves, spec)
        if shape is None or shape.is_left:
            return self._forward(*args, **kwargs)
        if self._state is not None and not self._state.is_unchanged():
            self.forget()
            return self._forward(*args, **kwargs)
        shape.calls += 1
        if shape.is_special:
            if shape.calls % RECHECK == 0 and not is_special(self.module):
                shape.calls, shape.is_special = 0, False
            return self._forward(*args, **kwargs)
        if shape.calls <= WARM_UP:
            return self._forward(*args, **kwargs)
        if shape.calls == WARM_UP + 1:
            return self._observe(shape, args, kwargs)
        if shape.recording is None:
            self._record(shape, leaves, spec)
        return self._forward(*args, **kwargs) if shape.recording is None else shape.recording.replay(leaves)

    def _shape_of(self, leaves: list[Any], spec: Any) -> _Shape | None:
        """Returns what is known of the calls with a signature; `None` for a call that no graph can repeat."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(type(leaf) is Tensor or isinstance(leaf, _CONSTANTS) for leaf in leaves):
            return None
        device = tensors[0].device
        if device.type != self.device_type or any(tensor.device != device for tensor in tensors):
            return None
        if not on_default_stream(device):  # the graphs share buffers, and run one after the other in one stream
            return None
        key = signature(leaves, spec)
        if key not in self._shapes and len(self._shapes) >= MAX_SHAPES:
            if self._state is not None:
                return None
            self._shapes.clear()  # where a number is another one in each call, no signature comes twice
        return self._shapes.setdefault(key, _Shape())

    def _observe(self, shape: _Shape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call without a graph, and decides whether calls of its shape are recorded."""
        state = ModuleState(self.module)
        outputs, waits = waits_for_launches(lambda: self._forward(*args, **kwargs), device_of(args, kwargs))
        shape.is_special = state.is_special
        shape.is_left = not state.is_special and not (waits and state.is_unchanged())
        return outputs

    def _record(self, shape: _Shape, leaves: list[Any], spec: Any) -> None:
        """Records the calls of a shape; if that fails, all calls run without graphs from then on."""
        device, state = device_of(leaves), self._state or ModuleState(self.module)
        if state.is_special:  # since the call that was observed
            shape.is_special = True
            return
        self._state, self._memory = state, self._memory or GraphMemory()
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
                shape.recording = Recording(self._forward, leaves, spec, self._memory, warm_up=1)
            failure = None if has_room(device) else "too little of its memory would be left"
        except RuntimeError as error:
            failure = str(error).strip().partition("\n")[0]
            _repair_random_numbers(device)
        if failure is not None:
            say_once(f"Calls of {type(self.module).__name__} are not recorded as CUDA graphs: {failure}")
            self.forget()
            shape.recording, self._gives_up = None, True


def device_of(*arguments: Any) -> torch.device:
    """Returns the device of the first tensor among nested arguments."""
    return next(leaf.device for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))


def on_default_stream(device: torch.device) -> bool:
    """Returns whether the current stream of a CUDA device is its default one."""
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def has_room(device: torch.device) -> bool:
    """Returns whether a CUDA device has memory left for what runs beside the graphs, such as a decoder."""
    free, total = torch.cuda.mem_get_info(device)  # torch empties its cache before it records
    return free >= MIN_FREE_SHARE * total


def _repair_random_numbers(device: torch.device) -> None:
    """Lets torch draw random numbers on a device again, which it refuses after a recording has failed."""
    with suppress(RuntimeError), torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device=device)  # a recording that succeeds ends the state that the failed one has begun


def waits_for_launches(call: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """Runs a call, and returns its result and whether its launches take about as long as the whole of it.

    It is `False` too if the call waits for the GPU, for example to read a number, because no graph can do that.
    """
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with _waits() as waits:
            begin.record()
            started = time.perf_counter()
            result = call()
            launched = 1e3 * (time.perf_counter() - started)
            end.record()
        end.synchronize()
        return result, not waits and launched >= MIN_LAUNCH_SHARE * begin.elapsed_time(end)


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Returns a context whose list gets torch's warnings about operations that wait for the GPU."""
    messages: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield messages
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if _SYNCHRONIZES in str(warning.message):
            messages.append(str(warning.message))
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
