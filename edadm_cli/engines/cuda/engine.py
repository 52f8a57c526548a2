"""The CUDA engine, which runs a step as a CUDA graph of integer kernels in Triton and CUDA C++.

UNets are assembled from fused blocks. torch compiles every other denoiser around the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edadm_cli.engines.adapters import SideBranch, strengths_of, take_adapters
from edadm_cli.engines.base import FLOAT, AttentionForm, CompiledDenoiser, Engine, EngineOptions, LayerExecution
from edadm_cli.engines.cuda.compiled.held_prompts import hold_prompts
from edadm_cli.engines.cuda.compiled.layer_product import capability_refusal
from edadm_cli.engines.cuda.compiled.plain import build_plain, compile_blocks, has_fused_blocks
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.cuda.fused_blocks.assembly import Assembly
from edadm_cli.engines.cuda.graph_passes.attention_graph import INT8_ATTENTION, NO_INT8_ATTENTION, integer_kernel_runs
from edadm_cli.engines.cuda.products.lowering import Lowering, refusal
from edadm_cli.engines.cuda.selection import faster_in_float
from edadm_cli.engines.cuda.state import StepState
from edadm_cli.engines.cuda.times import measured_times
from edadm_cli.quant.layers import QuantizedLayer

_HEAD_WIDTH = 64  # channels per head, a usual number, with which it is found out whether the kernel of attention runs


class CudaEngine(Engine):
    """Runs quantized denoisers on the kernels of `edadm_kernels`.

    On a CPU, the kernels' reference in plain torch computes the same sums. It is exact and slow, and tests use it.

    Args:
        cuda_graphs: Whether each step is recorded once and replayed, on CUDA only.
        pack_weights: Whether weights of at most four bits stay packed and are unpacked inside the kernels, which saves
            memory but not time. By default they are unpacked once.
        prompt_cache: Whether keys and values of cross-attention are computed once per prompt tensor, not in every step.
        float_where_faster: Whether layers that float16 runs faster at the size of the example call run in float16. The
            times that were measured on this type of GPU (`times.json`) decide. Without such times, and with packed
            weights, no layer does.
    """

    name: ClassVar[str] = "cuda"
    description: ClassVar[str] = (
        "INT8 kernels in Triton and CUDA C++ for NVIDIA GPUs, steps in CUDA graphs; on a CPU their slow reference"
    )
    device_types: ClassVar[tuple[str, ...]] = ("cuda", "cpu")
    takes_adapters: ClassVar[bool] = True
    # Sums are exact. The epilogue multiplies, subtracts and adds once each in float32, each with an error of 2^-24 of
    # its terms, which exceed the result if they cancel. The measured error over random layers is below 1e-6.
    layer_bound: ClassVar[float] = 1e-5
    attention_forms: ClassVar[tuple[AttentionForm, ...]] = ("float", "int8")

    def __init__(
        self,
        *,
        cuda_graphs: bool = True,
        pack_weights: bool = False,
        prompt_cache: bool = True,
        float_where_faster: bool = True,
    ) -> None:
        self._cuda_graphs, self._pack_weights, self._prompt_cache = cuda_graphs, pack_weights, prompt_cache
        self._float_where_faster = float_where_faster

    def refusal(self, device: torch.device) -> str | None:
        """Returns a sentence that says why the kernels cannot run on a device; `None` if they can."""
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"The CUDA engine runs on CUDA devices, not on {device.type}."
        if not torch.cuda.is_available():
            return "The CUDA engine needs a CUDA device, and this machine has none."
        reason = capability_refusal(device)
        return None if reason is None else f"The CUDA engine cannot run on this device: {reason}."

    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns a clause that says why the kernels cannot run a layer; `None` if they can."""
        return refusal(layer)

    @torch.no_grad()
    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Assembles fused blocks, or has torch compile the denoiser. The first call of a step records its graph."""
        self.require(options.device)
        on_cuda = options.device.type == "cuda"
        strengths = strengths_of(denoiser)
        denoiser, adapters = take_adapters(denoiser)
        is_assembled = has_fused_blocks(denoiser)
        if not is_assembled:
            model, layers = build_plain(denoiser, options.device, options.rest_dtype, adapters)
            state = StepState()
            if self._prompt_cache:
                hold_prompts(model, state.prompt)
            if on_cuda:
                compile_blocks(model, options.attention)
        else:
            left_in_float = self._left_in_float(denoiser, args, kwargs, options)
            assembly = Assembly(self._lowering(options, left_in_float, adapters), self._prompt_cache, options.attention)
            model, layers = assembly.build(denoiser)
            state = assembly.state
        if options.attention == "int8":
            runs = integer_kernel_runs(options.device, options.rest_dtype, _HEAD_WIDTH)
            layers = tuple(_with_int8_attention(row, runs) for row in layers)
        compiled = CudaDenoiser(model, layers, state, options, self._cuda_graphs and on_cuda, is_assembled)
        compiled.set_strengths(strengths)
        return compiled

    @torch.no_grad()
    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Returns one layer as a product, which quantizes its input, multiplies and applies the epilogue."""
        self.require(options.device)
        product = self._lowering(options).product("", layer)

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            return product(x.to(options.device, options.rest_dtype))

        return run

    def _left_in_float(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> dict[str, str]:
        """Returns the names of the layers that float16 runs faster, each with the reason."""
        times = measured_times(options.device, options.rest_dtype)
        if times is None or self._pack_weights or not self._float_where_faster:
            return {}
        return faster_in_float(denoiser, args, kwargs, options.rest_dtype, *times, self._prompt_cache)

    def _lowering(
        self,
        options: EngineOptions,
        left_in_float: Mapping[str, str] | None = None,
        adapters: Mapping[str, SideBranch] | None = None,
    ) -> Lowering:
        return Lowering(options.device, options.rest_dtype, self._pack_weights, left_in_float or {}, adapters or {})


def _with_int8_attention(row: LayerExecution, runs: bool) -> LayerExecution:
    if row.kind != "attention" or row.planned != FLOAT:
        return row
    return replace(row, precision="int8", reason=INT8_ATTENTION) if runs else replace(row, reason=NO_INT8_ATTENTION)
