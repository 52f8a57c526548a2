"""Step caching of diffusers on quantized denoisers: steps that change little reuse results of an earlier step.

A cache wraps blocks, or attention and feed-forward layers, and skips calls of them; it does not matter whether they are
quantized. diffusers' own `enable_cache` exists for some transformers only; this module puts its hooks on any denoiser
with the parts that they need.

References:
    TaylorSeer, arXiv 2503.06923. First-block cache: github.com/chengzeyi/ParaAttention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.errors import UsageError
from edadm_cli.integrations.cache_settings import FIRST_BLOCK, TAYLORSEER, StepCache
from edadm_cli.models.loaded import LoadedModel

_WHOLE_STEPS = 2  # TaylorSeer extrapolates from the difference of two steps
_PARTS = (r".*\.(attn\d?|ff|ff_context|attention|feed_forward|mlp)",)
_BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")


def enable_cache(model: LoadedModel, setting: str) -> None:
    """Puts a cache on the denoiser of a pipeline, in place, whether torch or an engine runs it.

    Args:
        model: The pipeline.
        setting: `NAME` or `NAME:VALUE`, see `StepCache`.

    Raises:
        UsageError: There is no such cache, the denoiser lacks the parts that it needs, or the engine runs each step as
            one graph.
    """
    cache, denoiser = StepCache.parse(setting), model.denoiser
    if isinstance(denoiser, EngineDenoiser):
        parts = denoiser.compiled.parts()
        _apply(parts, cache)
        if cache.name == FIRST_BLOCK:  # parts of blocks may share tensors that are no arguments, whole blocks do not
            _record_parts(parts, denoiser.compiled.record)
        denoiser.use_cache_of(parts)
    else:
        _apply(denoiser, cache)


def _apply(denoiser: nn.Module, cache: StepCache) -> None:
    """Puts diffusers' hooks on a denoiser; compiled parts are compiled inside of the hooks then."""
    from diffusers.hooks import HookRegistry

    cached = _without_last_block(denoiser) if cache.name == FIRST_BLOCK else denoiser
    if cache.name == FIRST_BLOCK and sum(len(blocks) for blocks in _block_lists(cached).values()) < 2:
        raise UsageError(
            "The first-block cache needs a list of blocks, of which it can skip all but the first; "
            f"{type(denoiser).__name__} has none that is long enough.",
            hint=f"--cache {TAYLORSEER}",
        )
    _register_replaced_blocks(denoiser)
    config, apply = _config(cache)
    enable: Any = getattr(type(denoiser), "enable_cache", None)
    if enable is not None:
        enable(denoiser, config)
    else:
        apply(cached, config)
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        registry.invalidate_child_registries_cache()
        _stay_in_one_context(denoiser)
    if not any(hasattr(module, "_diffusers_hook") for module in denoiser.modules() if module is not denoiser):
        raise UsageError(f"{type(denoiser).__name__} has no parts that the cache '{cache.name}' could skip.")
    _compile_inside_hooks(denoiser)


def _register_replaced_blocks(denoiser: nn.Module) -> None:
    """Registers an engine's block with diffusers, with the outputs of the block that it replaces."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for module in denoiser.modules():
        replaced = vars(module).get("replaces")
        if replaced is not None:
            known = TransformerBlockRegistry.get(replaced)
            metadata = TransformerBlockMetadata(
                return_hidden_states_index=known.return_hidden_states_index,
                return_encoder_hidden_states_index=known.return_encoder_hidden_states_index,
            )
            TransformerBlockRegistry.register(type(module), metadata)


def _config(cache: StepCache) -> tuple[Any, Callable[..., None]]:
    from diffusers import hooks

    if cache.name == FIRST_BLOCK:
        return hooks.FirstBlockCacheConfig(threshold=cache.value), hooks.apply_first_block_cache
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=int(cache.value),
        disable_cache_before_step=_WHOLE_STEPS,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(_PARTS),
    )
    return config, hooks.apply_taylorseer_cache


def _without_last_block(denoiser: nn.Module) -> nn.Module:
    """Returns the lists of blocks without a last one that returns no text states (Stable Diffusion 3).

    The first-block cache reads the residuals of both streams from the last block of the lists; a block that is not in
    the lists is computed in each step.
    """
    lists = _block_lists(denoiser)
    if not any(getattr(blocks[-1], "context_pre_only", False) for blocks in lists.values()):
        return denoiser
    shown = nn.Module()
    for name, blocks in lists.items():
        shown.add_module(name, nn.ModuleList(list(blocks)[:-1]))
    return shown


def _block_lists(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    children = denoiser.named_children()
    return {name: child for name, child in children if name in _BLOCK_LISTS and isinstance(child, nn.ModuleList)}


def _stay_in_one_context(denoiser: nn.Module) -> None:
    """Names the calls and resets the cache after each image, as pipelines do for denoisers with `enable_cache`.

    These pipelines pass both branches of guidance in one call, so that there is one kind of call.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    def forget() -> None:
        HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks(recurse=True)
        _set_cache_context(denoiser, CacheContext("call"))

    forget()
    denoiser.__dict__["_reset_stateful_cache"] = forget  # pipelines call it when an image is finished


def _compile_inside_hooks(denoiser: nn.Module) -> None:
    """Moves compilation inside of the hooks, which decide in Python what is skipped."""
    hooked = [module for module in denoiser.modules() if hasattr(module, "_diffusers_hook")]
    for module in denoiser.modules():
        if module._compiled_call_impl is None or not any(inner in hooked for inner in module.modules()):
            continue
        module._compiled_call_impl = None
        for inner in module.modules():
            registry: Any = getattr(inner, "_diffusers_hook", None)
            for reference in () if registry is None else registry._fn_refs:
                if reference.original_forward is not None:
                    reference.original_forward = torch.compile(reference.original_forward, dynamic=False)


def _record_parts(denoiser: nn.Module, record: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Has an engine record what the cache skips or keeps: what is inside of the hooks, and children without hooks."""
    from edadm_cli.engines.cuda.compiled.conditioning import Conditioning  # imports torch's compiler

    hooked = [module for module in denoiser.modules() if hasattr(module, "_diffusers_hook") and module is not denoiser]
    for module in hooked:
        registry: Any = module._diffusers_hook
        innermost = next((ref for ref in registry._fn_refs if ref.original_forward is not None), None)
        if innermost is not None:
            innermost.original_forward = record(innermost.original_forward)
    for child in denoiser.children():
        has_weights = any(True for _ in itertools.chain(child.parameters(), child.buffers()))
        is_called = not isinstance(child, nn.ModuleList | Conditioning)
        if is_called and has_weights and not any(inner in hooked for inner in child.modules()):
            child.forward = record(child.forward)
