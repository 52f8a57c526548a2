"""What the CUDA engine does to a transformer before torch compiles it: fewer launches, the same integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.adapters import SideBranch
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.compiled.plain import build_plain
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import initialize
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.quant.network import deploy
from tests.denoisers.families import RECIPE, Call, quantized_denoiser

CPU = EngineOptions(device=torch.device("cpu"))
ON_CPU = KernelProduct(("cpu",))
COMPILED = 3e-2
"""A normalization that torch decomposes rounds otherwise in its last bit, which turns single codes."""


class Calls(TorchDispatchMode):
    """Counts operations of the namespace `edadm`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "edadm":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with Calls() as calls:
        yield calls.counts


def three_blocks() -> tuple[nn.Module, Call]:
    denoiser = DiTTransformer2DModel(
        sample_size=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, out_channels=8, norm_num_groups=4
    )
    initialize(denoiser.eval().requires_grad_(False), 0)
    call = example_call(denoiser, batch_size=2, size=(8, 8))
    with torch.no_grad():
        quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    return denoiser, call


def exact(denoiser: nn.Module, call: Call) -> Tensor:
    return prediction_of(ReferenceEngine().compile(denoiser, *call, CPU)(*call[0], **call[1]))


@torch.no_grad()
def test_blocks_with_embedders_of_their_own_are_conditioned_in_three_launches() -> None:
    denoiser, call = three_blocks()
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    with counted() as counts:
        actual = prediction_of(compiled(*call[0], **call[1]))
    assert counts["linear_stack"] == 3
    assert counts["linears"] == 3, "queries, keys and values of each block"
    assert counts["linear"] == 3 * 3 + 2, (
        "attention's second, both of the feed-forward layer; the first norm, the last layer"
    )
    assert relative_l2(actual, exact(denoiser, call)) < 1e-3
    later = {**call[1], "timestep": call[1]["timestep"] + 100}
    again = prediction_of(compiled(*call[0], **later))
    assert relative_l2(again, exact(denoiser, (call[0], later))) < 1e-3, "every step has its own"


def three_joint_blocks() -> tuple[nn.Module, Call]:
    denoiser = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "qk_norm": "rms_norm",
        },
        **{"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16},
        **{"out_channels": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1)},
    )
    initialize(denoiser.eval().requires_grad_(False), 0)
    call = example_call(denoiser, batch_size=2, size=(8, 8))
    with torch.no_grad():
        quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    return denoiser, call


@torch.no_grad()
def test_projections_of_one_embedding_are_computed_in_one_launch_per_size() -> None:
    denoiser, call = three_joint_blocks()
    compiled: Any = CudaEngine().compile(denoiser, *call, CPU)
    with counted() as counts:
        actual = prediction_of(compiled(*call[0], **call[1]))
    assert counts["linear_stack"] == 3, "nine, six and two vectors per layer"
    assert relative_l2(actual, exact(denoiser, call)) < 1e-3
    block: Any = compiled.parts().get_submodule("transformer_blocks.1")
    places = []
    for steps in (100, 200):
        later = {**call[1], "timestep": call[1]["timestep"] + steps}
        again = prediction_of(compiled(*call[0], **later))
        assert relative_l2(again, exact(denoiser, (call[0], later))) < 1e-3, "every step has its own"
        assert relative_l2(again, actual) > 1e-2
        places.append(block.norm1.linear.output.data_ptr())
    assert places[0] == places[1], "graphs of single blocks read one place"


@pytest.mark.parametrize(("family", "launches"), [("unet", 6), ("pixart", 2), ("sd3", 3), ("flux", 3)])
@torch.no_grad()
def test_layers_that_read_one_tensor_are_multiplied_together(family: str, launches: int) -> None:
    denoiser, call = quantized_denoiser(family)
    expected = exact(denoiser, call)
    deploy(denoiser, ON_CPU)
    with counted() as counts:
        actual = prediction_of(denoiser(*call[0], **call[1]))
    assert counts["linears"] == launches
    assert relative_l2(actual, expected) < 1e-5
    held = [layer.member.shared for layer in quantized_layers(denoiser).values() if layer.member is not None]
    assert all(shared.source is None and not shared.outputs for shared in held), "nothing stays in memory"


@torch.no_grad()
def test_layers_with_quantizers_of_their_own_are_multiplied_one_by_one() -> None:
    denoiser, call = quantized_denoiser("dit")
    denoiser.get_submodule("transformer_blocks.0.attn1.to_k").get_buffer("input_scale").mul_(1.5)
    expected = exact(denoiser, call)
    deploy(denoiser, ON_CPU)
    with counted() as counts:
        actual = prediction_of(denoiser(*call[0], **call[1]))
    assert counts["linears"] == 0
    assert relative_l2(actual, expected) < 1e-5


@torch.no_grad()
def test_an_attention_over_two_tensors_is_seen_by_what_it_reads() -> None:
    denoiser, _ = quantized_denoiser("dit")
    attention: Any = denoiser.get_submodule("transformer_blocks.0.attn1")
    deploy(denoiser, ON_CPU)
    x, other = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    alone = [
        ON_CPU.linear(layer, ON_CPU.codes(layer, y).view(-1, 16), y.dtype).view(2, 3, 16)
        for layer, y in ((attention.to_q, x), (attention.to_k, other), (attention.to_v, other))
    ]
    for _ in range(2):
        actual = [attention.to_q(x), attention.to_k(other), attention.to_v(other)]
        assert all(torch.equal(a, b) for a, b in zip(actual, alone, strict=True))
    assert not attention.to_q.member.shared.is_active


@torch.no_grad()
def test_the_halves_of_a_single_block_of_flux_meet_as_codes() -> None:
    denoiser, call = quantized_denoiser("flux", num_single_layers=2)
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    with counted() as counts:
        actual = prediction_of(compiled(*call[0], **call[1]))
    assert (counts["linears_gelu"], counts["linear_joined"]) == (2, 2), "one of each per block"
    assert relative_l2(actual, exact(denoiser, call)) < 1e-3


@pytest.mark.parametrize(("family", "joined"), [("flux", 3 + 2), ("sd3", 3 + 2)])
@torch.no_grad()
def test_heads_of_text_and_image_are_joined_by_one_kernel(family: str, joined: int) -> None:
    """Queries, keys and values of two streams; queries and keys of one."""
    denoiser, call = quantized_denoiser(family)
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    with counted() as counts:
        prediction = prediction_of(compiled(*call[0], **call[1]))
    assert counts["join_heads"] == joined
    assert relative_l2(prediction, exact(denoiser, call)) < 1e-3


@torch.no_grad()
def test_the_prompt_of_a_pixart_is_projected_once_and_followed() -> None:
    denoiser, (args, kwargs) = quantized_denoiser("pixart")
    compiled: Any = CudaEngine().compile(denoiser, args, kwargs, CPU)
    projections: list[int] = []
    compiled.model.caption_projection.layer.register_forward_hook(lambda *_: projections.append(1))
    with counted() as first:
        compiled(*args, **kwargs)
    with counted() as again:
        compiled(*args, **kwargs)
    assert first["linears"] - again["linears"] == 1, "keys and values of the only block"
    assert len(projections) == 1, "the prompt itself is projected for the only block, and not once per call"
    kwargs["encoder_hidden_states"].mul_(0.5)
    with counted() as anew:
        prediction = prediction_of(compiled(*args, **kwargs))
    assert anew == first
    assert relative_l2(prediction, exact(denoiser, (args, kwargs))) < 1e-3


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
@torch.no_grad()
def test_what_the_engine_compiles_is_one_graph(family: str) -> None:
    """The path of a GPU, fused blocks and all, by the reference kernels."""
    denoiser, call = three_blocks() if family == "dit" else quantized_denoiser(family)
    model, _ = build_plain(denoiser, torch.device("cpu"), torch.float32)
    torch._dynamo.reset()
    for part in (model, model._modules.get("conditioning")):
        if part is not None:
            part.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    assert relative_l2(prediction_of(model(*call[0], **call[1])), exact(denoiser, call)) < COMPILED


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.attn.to_k",
    ],
)
@torch.no_grad()
def test_a_layer_with_a_lora_is_not_fused_away(name: str) -> None:
    denoiser, call = quantized_denoiser("flux")
    outputs, inputs = denoiser.get_submodule(name).weight_shape
    branch = SideBranch(torch.randn(4, inputs), torch.randn(outputs, 4), [(name, "style", 4)])
    branch.set_strengths({(name, "style"): 1.0})
    model, _ = build_plain(denoiser, torch.device("cpu"), torch.float32, {name: branch})
    adapted = prediction_of(model(*call[0], **call[1]))
    branch.set_strengths({})
    assert relative_l2(adapted, exact(denoiser, call)) > 1e-2
    assert relative_l2(prediction_of(model(*call[0], **call[1])), exact(denoiser, call)) < 1e-3
