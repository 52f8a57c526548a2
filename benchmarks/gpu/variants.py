"""Contenders of `gpu_models.py` with a step cache, with LoRA adapters, or with other kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from edadm_cli.bench.pipeline import TimedDenoiser
from edadm_cli.engines.base import CompiledDenoiser
from edadm_cli.engines.cuda.fused_blocks.transformer import FusedTransformerBlock
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.integrations.caching import enable_cache
from edadm_cli.integrations.lora import add_adapter
from edadm_cli.quant.layers import QuantizedLayer
from edadm_kernels import norm_launch
from edadm_kernels.hopper import group_norm, matrices
from edadm_kernels.norm_plans import layer_plan

LIMITS = ((64, 4), (128, 8), (256, 16))  # of chunks of a GroupNorm before its blocks went through several
Call = tuple[tuple[Any, ...], dict[str, Any]]
Function = Callable[..., Any]
CACHE = "first-block:0.08"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", "proj_out")
ADAPTERS = {  # name -> rank and the ends of the names of the adapted layers
    "LoRA of rank 4, attention": (4, ATTENTION),
    "LoRA of rank 16, attention": (16, ATTENTION),
    "LoRA of rank 64, attention": (64, ATTENTION),
    "LoRA of rank 16, attention and feed-forward": (16, ATTENTION + FEED_FORWARD),
}


@contextmanager
def one_chunk_per_block() -> Iterator[None]:
    """Makes blocks of GroupNorm process one chunk of pixels each, inside a `with` block."""
    group_norm.group_norm_plan.cache_clear()
    with (
        patch.object(group_norm, "_LIMITS", LIMITS),
        patch.object(group_norm.GroupNormPlan, "repeat", lambda *_: 1),
    ):
        yield
    group_norm.group_norm_plan.cache_clear()


@contextmanager
def several_warps_per_program() -> Iterator[None]:
    """Makes a program of LayerNorm four warps wherever it is one by measurement, inside a `with` block."""
    with patch.object(norm_launch, "layer_plan", lambda channels, *_: layer_plan(channels)):
        yield


@contextmanager
def residuals_in_other_products() -> Iterator[None]:
    """Keeps the kernel for large matrices from adding the residuals of linear layers, inside a `with` block."""
    usual = matrices.choose_over_single

    def choose(*args: Any, adds: bool = False, **kwargs: Any) -> matrices.MatrixTile | None:
        return None if adds else usual(*args, **kwargs)

    with patch.object(matrices, "choose_over_single", choose):
        yield


def staged(name: str, run: Callable[[], Function], call: Call, is_fused: bool) -> dict[str, Function]:
    """Returns contenders by name: the CUDA engine without some of its fusions, or with other kernels.

    Args:
        name: The name of the engine among the contenders.
        run: A function that compiles a denoiser for the engine.
        call: Arguments of a call; each contender is called once, so that its CUDA graph is recorded.
        is_fused: Whether the engine assembles the denoiser from fused blocks, which some changes concern.
    """

    @contextmanager
    def codes_by_themselves() -> Iterator[None]:
        norm = Lowering.norm
        with (
            patch.object(Lowering, "norm", lambda self, *args, shortcut=None, **kwargs: norm(self, *args, **kwargs)),
            patch.object(FusedTransformerBlock, "write_for", lambda *_: False),
        ):
            yield

    changes: list[tuple[Callable[[], AbstractContextManager[None]], str]]
    changes = [(several_warps_per_program, "four warps per program of LayerNorm")]
    if is_fused:
        changes += [
            (residuals_in_other_products, "residuals in the other kernel of products"),
            (codes_by_themselves, "codes of shortcuts and projections by themselves"),
            (one_chunk_per_block, "one chunk per block of GroupNorm"),
        ]
    contenders = {}
    for change, change_name in changes:
        with change():
            contenders[f"{name}, {change_name}"] = function = run()
            function(*call[0], **call[1])
    return contenders


def shared_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model's modules with the same tensors, which torch has not compiled."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, tensors)
    for module in copied.modules():
        module._compiled_call_impl = None
    return copied


def cached(name: str, model: nn.Module, function: Function, device: torch.device) -> dict[str, Function]:
    """Returns two contenders: a step that the first-block cache computes, and a step for which it reuses the last one.

    Args:
        name: The beginning of their names.
        model: The denoiser.
        function: What runs it: an engine, or torch's module or its CUDA graph.
        device: The device.
    """
    compiled = function if isinstance(function, CompiledDenoiser) else TimedDenoiser(function, device)
    denoiser = EngineDenoiser(shared_copy(model), compiled)
    enable_cache(SimpleNamespace(denoiser=denoiser), CACHE)  # type: ignore[arg-type]

    def reused(*args: Any, **kwargs: Any) -> Any:
        with denoiser.cache_context("cond"):
            return denoiser(*args, **kwargs)

    def whole(*args: Any, **kwargs: Any) -> Any:
        denoiser._reset_stateful_cache()
        return reused(*args, **kwargs)

    return {f"{name}, cache, whole step": whole, f"{name}, cache, reused step": reused}


def adapted(model: nn.Module, rank: int, ends: tuple[str, ...], dtype: torch.dtype) -> nn.Module:
    """Returns a copy of a quantized denoiser with a LoRA adapter of random factors, which shares the other tensors.

    Args:
        model: A denoiser of diffusers with quantized layers.
        rank: The rank of the adapter.
        ends: The ends of the names of the linear layers in transformer blocks that get it.
        dtype: Element type of the factors.
    """
    from peft import LoraConfig

    copied = shared_copy(model)
    names = [
        name
        for name, layer in copied.named_modules()
        if isinstance(layer, QuantizedLayer)
        and layer.operation.kind == "linear"
        and "transformer_blocks" in name
        and name.endswith(ends)
    ]
    add_adapter(copied, LoraConfig(r=rank, target_modules=names, init_lora_weights=False))
    for name, parameter in copied.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return copied.requires_grad_(False)
