"""A denoiser that is built from kernels and has the calls of the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edadm_cli.engines.adapters import SideBranch, Strengths
from edadm_cli.engines.base import CompiledDenoiser, EngineOptions, LayerExecution, OperationTime
from edadm_cli.engines.cuda.capture import GraphedFunction, GraphMemory
from edadm_cli.engines.cuda.compiled.conditioning import Conditioning
from edadm_cli.engines.cuda.compiled.plain import many_shapes
from edadm_cli.engines.cuda.profiling import operation_times
from edadm_cli.engines.cuda.state import StepState

PROMPT = "encoder_hidden_states"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which a CUDA device is the current one, because graphs are recorded on its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaDenoiser(CompiledDenoiser):
    """Runs a built model: it moves inputs to the device and element type, runs one step, and moves outputs back.

    Args:
        model: The model that `Assembly.build` or `build_plain` returned.
        layers: How the layers of the model run.
        state: The state that the blocks share.
        options: The options of the engine, of which device and element type count.
        cuda_graphs: Whether a step is recorded and replayed.
        is_assembled: Whether the model consists of fused blocks; otherwise it runs the denoiser's own `forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[LayerExecution, ...],
        state: StepState,
        options: EngineOptions,
        cuda_graphs: bool,
        is_assembled: bool = True,
    ) -> None:
        self.model, self._layers, self._state, self._options = model, layers, state, options
        self._is_assembled = is_assembled
        self._signature = inspect.signature(model.forward)
        self._step: Callable[..., Any] = GraphedFunction(self._eager) if cuda_graphs else self._eager
        self._part_memory = GraphMemory() if cuda_graphs else None

    @property
    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns how each layer runs, in the order of the denoiser's modules."""
        return self._layers

    def parts(self) -> nn.Module:
        """Returns the denoiser if it runs its own `forward`. From then on, no graph is recorded of a whole step."""
        if self._is_assembled:
            return super().parts()
        self._step = self._eager
        conditioning = self.model._modules.get("conditioning")
        if isinstance(conditioning, Conditioning):
            conditioning.hold_outputs()
        return self.model

    def record(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a part that runs as separate CUDA graphs, which share their memory."""
        return part if self._part_memory is None else GraphedFunction(part, self._part_memory)

    @torch.no_grad()
    def set_strengths(self, strengths: Strengths) -> None:
        """Sets the strengths of the adapters that the denoiser was compiled with, in place; graphs stay valid."""
        for module in self.model.modules():
            if isinstance(module, SideBranch):
                module.set_strengths(strengths)
        self._state.prompt.forget()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one step. Outputs have the element type of the call's first floating-point tensor."""
        return self._call(self._step, args, kwargs)

    @torch.no_grad()
    def call_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one step kernel by kernel, without a graph."""
        return self._call(self._eager, args, kwargs)

    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns the times of one call: those of its kernels on CUDA, and of its operations on a CPU."""
        self.call_eagerly(*args, **kwargs)
        step = partial(self.call_eagerly, *args, **kwargs)
        return operation_times(self.model, step, self._layers, self._options.device)

    def _call(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._arguments(args, kwargs)
        prompt = arguments.get(PROMPT)
        if self._state.prompt.is_used and isinstance(prompt, Tensor):
            with on_device(self._options.device):
                self._state.prompt.hold(prompt, self._placed)
        floats = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
        dtype = next(floats).dtype
        with on_device(self._options.device):
            outputs = step(**pytree.tree_map(self._placed, arguments))
        return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, outputs)

    def _eager(self, **arguments: Any) -> Any:
        self._state.begin()
        with many_shapes():
            return self.model(**arguments)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the call's arguments by name. A numeric timestep becomes a tensor, so that a graph can read it."""
        bound = dict(self._signature.bind(*args, **kwargs).arguments)
        timestep = bound.get("timestep")
        if isinstance(timestep, int | float):
            dtype = torch.float32 if isinstance(timestep, float) else torch.int64
            bound["timestep"] = torch.tensor(timestep, dtype=dtype)
        return bound

    def _placed(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = self._options.rest_dtype if leaf.is_floating_point() and leaf.ndim > 1 else leaf.dtype
        return leaf.to(self._options.device, dtype)
