"""Every family on CUDA: layers that multiply their codes, eager, compiled as one graph, and on the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import cast

import pytest
import torch

import edadm_kernels as kernels
from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.compiled.plain import placed_copy
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.pipeline import EngineDenoiser
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.integrations.caching import enable_cache
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.random_models import initialize
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.quant.network import deploy
from edadm_kernels import activated
from tests.denoisers.families import FAMILIES, RECIPE, Call, quantized_denoiser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Normalizations that are fused or decomposed round differently, which changes single codes of such small networks.
BOUNDS = {torch.float32: 3e-2, torch.float16: 1e-1, torch.bfloat16: 3e-1}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_cuda(call: Call) -> Call:
    placed: Call = torch.utils._pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, call)
    return placed


def options(dtype: torch.dtype) -> EngineOptions:
    return EngineOptions(device=torch.device("cuda"), rest_dtype=dtype)


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_deployed_denoiser_eager_compiled_and_in_graphs(family: str, bits: str) -> None:
    denoiser, call = quantized_denoiser(family, bits)
    args, kwargs = on_cuda(call)
    exact = prediction_of(ReferenceEngine().compile(denoiser, args, kwargs, options(torch.float32))(*args, **kwargs))
    model = placed_copy(denoiser, torch.device("cuda"), torch.float32)
    deploy(model, KernelProduct())
    layers = quantized_layers(model).values()
    assert any(layer.product.runs(layer) for layer in layers if layer.product is not None)
    eager = prediction_of(model(*args, **kwargs))
    assert relative_l2(eager, exact) < BOUNDS[torch.float32]
    if bits == "w4a8":  # the compiled graph is the same
        return
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # the third is a graph's replay
        actual = prediction_of(compiled(*args, **kwargs)).clone()
    assert relative_l2(actual, exact) < BOUNDS[torch.float32]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the exchanges need 9.0"
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_torch_compile_alone_exchanges_attention_and_group_norms(mode: str) -> None:
    fields = {"block_out_channels": (64, 128), "norm_num_groups": 8, "attention_head_dim": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    denoiser, call = quantized_denoiser("unet", **fields, **blocks)
    args, kwargs = on_cuda(call)
    model = placed_copy(denoiser, torch.device("cuda"), torch.float16)
    deploy(model, KernelProduct())
    args = tuple(x.half() if x.is_floating_point() and x.ndim > 1 else x for x in args)
    kwargs = {name: x.half() if x.is_floating_point() else x for name, x in kwargs.items()}
    expected = prediction_of(model(*args, **kwargs)).clone()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        actual = prediction_of(compiled(*args, **kwargs)).clone()
    assert relative_l2(actual, expected) < BOUNDS[torch.float16]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        compiled(*args, **kwargs)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert any(name.startswith("attention") for name in names)
    assert any(name.startswith("group_") for name in names)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the exchanges need 9.0"
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_torch_compile_alone_exchanges_feed_forward_layers(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bool] = []

    def noted(pays: Callable[..., bool]) -> Callable[..., bool]:
        def answer(*operands: torch.Tensor) -> bool:
            answers.append(pays(*operands))
            return answers[-1]

        return answer

    monkeypatch.setattr(activated, "MIN_ROWS", 1)
    monkeypatch.setattr(kernels, "gelu_pays", noted(kernels.gelu_pays))
    monkeypatch.setattr(kernels, "geglu_pays", noted(kernels.geglu_pays))
    fields = {"block_out_channels": (16,)} if family == "unet" else {}
    denoiser, call = quantized_denoiser(family, **fields)
    args, kwargs = on_cuda(call)
    exact = prediction_of(ReferenceEngine().compile(denoiser, args, kwargs, options(torch.float32))(*args, **kwargs))
    model = placed_copy(denoiser, torch.device("cuda"), torch.float32)
    deploy(model, KernelProduct())
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # the third is a graph's replay
        actual = prediction_of(compiled(*args, **kwargs)).clone()
    assert relative_l2(actual, exact) < BOUNDS[torch.float32]
    modules = [module for module in model.modules() if type(module).__name__ == "FeedForward"]
    assert sum(answers) >= len(modules) > 0  # the prompt's projection of PixArt may have too few channels


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("dit", torch.float16), ("pixart", torch.float16), ("sd3", torch.bfloat16), ("flux", torch.bfloat16)],
)
@torch.no_grad()
def test_the_engine_records_a_step_of_every_family(family: str, dtype: torch.dtype) -> None:
    denoiser, call = quantized_denoiser(family)
    args, kwargs = on_cuda(call)
    exact = prediction_of(ReferenceEngine().compile(denoiser, args, kwargs, options(torch.float32))(*args, **kwargs))
    compiled = CudaEngine().compile(denoiser, args, kwargs, options(dtype))
    actual = prediction_of(compiled(*args, **kwargs))
    assert relative_l2(actual, exact) < BOUNDS[dtype]
    assert torch.equal(actual, prediction_of(compiled(*args, **kwargs))), "a replay repeats"
    assert compiled.profile(*args, **kwargs)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("flux", {"num_single_layers": 3}), *((f, {"num_layers": 3}) for f in ("sd3", "dit", "pixart"))],
)
@torch.no_grad()
def test_the_first_block_cache_replays_graphs_of_single_blocks(family: str, fields: dict[str, int]) -> None:
    denoiser = FAMILIES[family](**fields).eval().requires_grad_(False)
    initialize(denoiser, 0)
    call = example_call(denoiser, batch_size=2, size=(8, 8))
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    args, kwargs = on_cuda(call)
    compiled = CudaEngine().compile(denoiser, args, kwargs, options(torch.float32))
    steps = [{**kwargs, "timestep": kwargs["timestep"] * factor} for factor in (1.0, 0.6, 0.3)]
    expected = [prediction_of(compiled(*args, **step)).clone() for step in steps]
    stand_in = EngineDenoiser(denoiser, compiled)
    enable_cache(cast(LoadedModel, SimpleNamespace(denoiser=stand_in)), "first-block:1e-9")
    context = stand_in.cache_context("cond") if hasattr(stand_in, "cache_context") else nullcontext()
    with context:
        for _ in range(2):  # the second time, all graphs are replayed
            for step, prediction in zip(steps, expected, strict=True):
                assert relative_l2(prediction_of(stand_in(*args, **step)), prediction) < BOUNDS[torch.float32]
