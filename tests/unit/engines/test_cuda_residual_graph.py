"""Products that add their results to a residual, exchanged in the graphs that torch compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, fx, nn
from torch._inductor import config

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.compiled.plain import build_plain
from edadm_cli.engines.cuda.graph_passes.residual_graph import replace_additions
from edadm_cli.engines.parity import relative_l2
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.network import deploy
from tests.denoisers.families import Call, quantized_denoiser

ADDED = torch.ops.edadm.linear_added.default


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "added_pays", lambda *_: True)
    torch._dynamo.reset()
    with config.patch(pre_grad_custom_pass=None):
        yield
    torch._dynamo.reset()


def deployed(family: str, **fields: Any) -> tuple[nn.Module, Call]:
    denoiser, call = quantized_denoiser(family, **fields)
    bind_methods(denoiser)
    deploy(denoiser, KernelProduct(("cpu",)))
    return denoiser, call


@torch.no_grad()
def exchanged(model: nn.Module, call: Call) -> list[tuple[Any, ...]]:
    """Compiles a model, compares its prediction with that of eager torch, and returns the arguments of additions."""
    arguments: list[tuple[Any, ...]] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        count = replace_additions(graph.graph)
        graph.graph.lint()
        graph.recompile()
        nodes = graph.graph.find_nodes(op="call_function", target=ADDED)
        assert len(nodes) == count
        arguments.extend(node.args for node in nodes)
        return graph.forward

    expected = prediction_of(model(*call[0], **call[1]))
    prediction = prediction_of(torch.compile(model, fullgraph=True, backend=backend)(*call[0], **call[1]))
    assert relative_l2(prediction, expected) < 3e-2  # single codes of such a small network differ
    return arguments


# Additions per block: of the attentions, and of the feed-forward layer; the text of a joint attention has both, too.
@pytest.mark.parametrize(
    ("family", "gated", "plain"), [("dit", 2, 0), ("pixart", 2, 1), ("sd3", 3, 0), ("flux", 4 + 1, 0), ("unet", 0, 3)]
)
def test_additions_of_every_family_are_part_of_the_products(family: str, gated: int, plain: int) -> None:
    denoiser, call = deployed(family, **({"up_block_types": ("UpBlock2D",)} if family == "unet" else {}))
    arguments = exchanged(denoiser, call)
    factors = [len(each) > 6 and each[6] is not None for each in arguments]
    assert sum(factors) >= gated
    assert len(factors) - sum(factors) >= plain


def test_the_engine_adds_in_its_products_too() -> None:
    denoiser, call = quantized_denoiser("pixart")
    model, _ = build_plain(denoiser, torch.device("cpu"), torch.float32)
    assert len(exchanged(model, call)) >= 3


def test_what_is_not_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "added_pays", lambda *_: False)
    assert not exchanged(*deployed("pixart"))


def test_an_adapter_has_its_effect() -> None:
    denoiser, call = deployed("sd3")
    model: Any = denoiser
    before = prediction_of(denoiser(*call[0], **call[1]))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out.0", "net.2"], init_lora_weights=False), "style")
    exchanged(denoiser, call)
    assert relative_l2(prediction_of(denoiser(*call[0], **call[1])), before) > 3e-2


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_hook_has_its_effect(factor: float) -> None:
    denoiser, call = deployed("pixart")
    (block,) = denoiser.transformer_blocks  # type: ignore[misc]
    count = len(exchanged(denoiser, call))
    torch._dynamo.reset()
    block.ff.register_forward_hook(lambda module, args, output: output * factor)  # type: ignore[union-attr]
    assert len(exchanged(denoiser, call)) == count - 1
