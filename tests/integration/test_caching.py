"""Step caching leaves out the same calls of a quantized denoiser as of a float one, in torch and on an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.errors import UsageError
from edadm_cli.integrations.cache_settings import StepCache
from edadm_cli.integrations.caching import enable_cache
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.recipe import load_recipe
from tests.denoisers import parts
from tests.denoisers.families import FAMILIES

STEPS = 5
DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "flux": partial(FAMILIES["flux"], num_layers=2, num_single_layers=2),
    "sd3": partial(FAMILIES["sd3"], num_layers=4),
    "dit": partial(FAMILIES["dit"], num_layers=3),
    "unet": parts.unet,
    "sdxl": parts.xl_unet,
}


def _quantized(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    denoiser = DENOISERS[kind]().eval().requires_grad_(False)
    call = example_call(denoiser, batch_size=2, size=(8, 8))
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [call])
    return denoiser, call


def _model(denoiser: nn.Module) -> LoadedModel:
    return cast(LoadedModel, SimpleNamespace(denoiser=denoiser))


@contextmanager
def _counted(denoiser: nn.Module) -> Iterator[list[int]]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handles = [m.register_forward_hook(count) for m in denoiser.modules() if isinstance(m, QuantizedLayer)]
    yield calls
    for handle in handles:
        handle.remove()


def _steps(denoiser: Any, call: Any, counted: nn.Module) -> tuple[list[int], list[Tensor]]:
    """Layers that each step computes, and its prediction, as a pipeline asks for them."""
    counts, predictions = [], []
    with _counted(counted) as calls, torch.no_grad():
        for _ in range(STEPS):
            calls[0] = 0
            if hasattr(denoiser, "cache_context"):
                with denoiser.cache_context("cond"):
                    predictions.append(denoiser(*call[0], **call[1])[0])
            else:
                predictions.append(denoiser(*call[0], **call[1])[0])
            counts.append(calls[0])
    denoiser._reset_stateful_cache()
    return counts, predictions


@pytest.mark.parametrize(
    ("kind", "setting", "computed"),
    [
        ("flux", "first-block", [True, False, False, False, False]),
        ("flux", "taylorseer:2", [True, True, False, True, False]),
        ("sd3", "first-block", [True, False, False, False, False]),
        ("sd3", "taylorseer:3", [True, True, False, True, False]),
        ("unet", "taylorseer:3", [True, True, False, True, False]),
        ("sdxl", "taylorseer:2", [True, True, False, True, False]),
    ],
)
def test_a_cache_leaves_out_steps_and_starts_anew_with_each_image(
    kind: str, setting: str, computed: list[bool]
) -> None:
    denoiser, call = _quantized(kind)
    with torch.no_grad():
        expected = denoiser(*call[0], **call[1])[0]
    enable_cache(_model(denoiser), setting)
    counts, predictions = _steps(denoiser, call, denoiser)
    assert [count == max(counts) for count in counts] == computed
    assert min(counts) < 0.7 * max(counts)
    for prediction in predictions:  # all steps have one input, so that what is reused is right
        torch.testing.assert_close(prediction, expected, rtol=1e-3, atol=1e-3)
    assert _steps(denoiser, call, denoiser)[0] == counts


@torch.no_grad()
def test_a_quantized_unet_takes_pyramid_attention_broadcast_from_diffusers() -> None:
    """Of diffusers' caches, this one and TaylorSeer skip layers of attention and need no list of blocks."""
    denoiser, call = _quantized("sdxl")
    expected = denoiser(*call[0], **call[1])[0]
    every_second: dict[str, Any] = dict.fromkeys(
        ("spatial_attention_block_skip_range", "cross_attention_block_skip_range"), 2
    )
    config = PyramidAttentionBroadcastConfig(**every_second, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(denoiser, config)
    counts = []
    for _ in range(STEPS):
        with _counted(denoiser) as calls:
            torch.testing.assert_close(denoiser(*call[0], **call[1])[0], expected)
        counts.append(calls[0])
    assert [count == max(counts) for count in counts] == [True, False, True, False, True]


def _configurations() -> dict[str, Any]:
    everywhere = {"spatial_attention_timestep_skip_range": (-1, 1001), "current_timestep_callback": lambda: 0}
    return {
        "first-block": hooks.FirstBlockCacheConfig(threshold=0.5),
        "taylorseer": hooks.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
        "magcache": hooks.MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4, threshold=0.5),
        "pyramid": hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **everywhere),
    }


@pytest.mark.parametrize("name", _configurations())
@torch.no_grad()
def test_diffusers_own_caches_skip_quantized_layers_and_leave_them_as_they_were(name: str) -> None:
    denoiser, (args, kwargs) = _quantized("flux")
    cached: Any = denoiser
    with _counted(denoiser) as whole:
        before = denoiser(*args, **kwargs)[0]
    cached.enable_cache(_configurations()[name])
    with _counted(denoiser) as calls, cached.cache_context("call"):
        outputs = [denoiser(*args, **kwargs)[0] for _ in range(4)]
    assert whole[0] < calls[0] < 4 * whole[0]
    for output in outputs:  # the input stays the same, so that what is reused is right
        torch.testing.assert_close(output, before)
    cached.disable_cache()
    assert torch.equal(denoiser(*args, **kwargs)[0], before)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_cache_works_on_the_engine_that_runs_the_denoisers_own_forward(kind: str) -> None:
    denoiser, call = _quantized(kind)
    compiled = CudaEngine().compile(denoiser, *call, EngineOptions(torch.device("cpu")))
    expected = compiled(*call[0], **call[1])[0]
    stand_in = EngineDenoiser(denoiser, compiled)
    enable_cache(_model(stand_in), "first-block")
    counts, predictions = _steps(stand_in, call, compiled.parts())
    assert counts[1] < counts[0]
    torch.testing.assert_close(predictions[-1], expected, rtol=1e-3, atol=1e-3)


class Recorded:
    """Stands in for a CUDA graph: it repeats the operations of the first call, on tensors that are in their places."""

    def __init__(self, part: Callable[..., Any]) -> None:
        self.part, self.graph = part, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.graph is None:

            def of_tensors(*values: Tensor) -> Any:
                rest = iter(values)
                filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = pytree.tree_unflatten(filled, spec)
                return self.part(*args, **kwargs)

            self.graph = make_fx(of_tensors)(*tensors)
        return self.graph(*tensors)


@pytest.mark.parametrize("kind", ["flux", "sd3", "dit"])
def test_parts_that_the_engine_records_read_nothing_but_arguments_and_fixed_places(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, call = _quantized(kind)
    compiled = CudaEngine().compile(denoiser, *call, EngineOptions(torch.device("cpu")))
    steps = [{**call[1], "timestep": call[1]["timestep"] * factor} for factor in (1.0, 0.6, 0.3)]
    expected = [compiled(*call[0], **step)[0] for step in steps]
    recorded: list[Recorded] = []

    def record(self: CudaDenoiser, part: Callable[..., Any]) -> Callable[..., Any]:
        recorded.append(Recorded(part))
        return recorded[-1]

    monkeypatch.setattr(CudaDenoiser, "record", record)
    stand_in = EngineDenoiser(denoiser, compiled)
    enable_cache(_model(stand_in), "first-block:1e-9")
    with torch.no_grad(), stand_in.cache_context("cond") if hasattr(stand_in, "cache_context") else nullcontext():
        for step, prediction in zip(steps, expected, strict=True):
            torch.testing.assert_close(stand_in(*call[0], **step)[0], prediction)
    assert sum(part.graph is not None for part in recorded) >= 3


def test_what_cannot_be_cached_is_refused_with_the_reason() -> None:
    denoiser, call = _quantized("unet")
    with pytest.raises(UsageError, match="list of blocks"):
        enable_cache(_model(denoiser), "first-block")
    few: Any = nn.Module()  # as in Stable Diffusion 3, where the last block is always computed
    few.transformer_blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    few.transformer_blocks[-1].context_pre_only = True
    with pytest.raises(UsageError, match="long enough"):
        enable_cache(_model(few), "first-block")
    compiled = CudaEngine().compile(denoiser, *call, EngineOptions(torch.device("cpu")))
    stand_in = EngineDenoiser(denoiser, compiled)
    with pytest.raises(UsageError, match="one graph"):
        enable_cache(_model(stand_in), "taylorseer")
    for text in ("teacache", "taylorseer:1.5", "taylorseer:inf", "first-block:x", "first-block:0", "first-block:inf"):
        with pytest.raises(UsageError):
            StepCache.parse(text)
