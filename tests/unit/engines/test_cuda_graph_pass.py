"""The exchanges in graphs of loaded exports, for whoever calls `torch.compile` with Inductor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.graph_passes import attention_graph
from edadm_cli.engines.cuda.graph_passes.graph_exchange import exchange
from edadm_cli.engines.cuda.graph_passes.inductor_pass import Exchanges
from edadm_cli.engines.parity import relative_l2
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.network import deploy
from tests.denoisers.families import Call, quantized_denoiser

COMPILED = 3e-2  # single codes of a network of 8 channels differ
Compiled = tuple[Tensor, list[str]]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_graph, "attend_pays", lambda *_: True)
    torch._dynamo.reset()
    with config.patch(pre_grad_custom_pass=None):
        yield
    torch._dynamo.reset()


def deployed(family: str, **fields: Any) -> tuple[nn.Module, Call]:
    denoiser, call = quantized_denoiser(family, **fields)
    deploy(denoiser, KernelProduct(("cpu",)))
    return denoiser, call


@torch.no_grad()
def compiled(model: nn.Module, call: Call, by_blocks: bool = False) -> Compiled:
    """Returns the prediction of a model behind Inductor's passes, and the operations of its graphs."""
    operations: list[str] = []

    def collect(graph: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_fx(graph, inputs, inner_compile=collect)  # type: ignore[return-value]

    if by_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]
        return prediction_of(model(*call[0], **call[1])), operations
    return prediction_of(torch.compile(model, fullgraph=True, backend=backend)(*call[0], **call[1])), operations


class Part(nn.Module):
    """A part of a denoiser, which takes one tensor and returns what a denoiser does."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Returns the part's output."""
        return (self.part(x),)


def attention() -> tuple[nn.Module, Call]:
    """An attention of a deployed denoiser, which compiles in a fraction of the denoiser's time, and a call of it."""
    denoiser, _ = deployed("pixart")
    part: Any = denoiser.transformer_blocks[0].attn1  # type: ignore[index, union-attr]
    x = torch.randn(2, 40, part.to_q.in_features, generator=torch.Generator().manual_seed(0))
    return Part(part), ((x,), {})


@pytest.mark.parametrize(("family", "by_blocks"), [("unet", False), ("pixart", False), ("flux", True)])
def test_attention_becomes_our_operation(family: str, by_blocks: bool) -> None:
    denoiser, call = deployed(family, **({"up_block_types": ("UpBlock2D",)} if family == "unet" else {}))
    with torch.no_grad():
        expected = prediction_of(denoiser(*call[0], **call[1]))
    prediction, operations = compiled(denoiser, call, by_blocks)
    assert "edadm.attend.default" in operations
    assert not any("scaled_dot_product" in name for name in operations)
    assert relative_l2(prediction, expected) < COMPILED


@pytest.mark.parametrize("joins", [False, True])
def test_group_norms_write_codes_and_convolutions_add(joins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "group_norm_pays", lambda *_: True)
    monkeypatch.setattr(kernels, "group_norm_joins", lambda *_: joins)
    denoiser, call = deployed("unet", up_block_types=("UpBlock2D",), use_linear_projection=joins)
    with torch.no_grad():
        expected = prediction_of(denoiser(*call[0], **call[1]))
    prediction, operations = compiled(denoiser, call)
    norms = [module for module in denoiser.modules() if isinstance(module, nn.GroupNorm)]
    assert operations.count("edadm.group_norm_to_codes.default") == len(norms) - 1, "the last layer reads no codes"
    assert operations.count("aten.native_group_norm.default") <= 1
    assert relative_l2(prediction, expected) < COMPILED


def test_a_convolution_adds_what_is_added_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "group_norm_pays", lambda *_: True)
    denoiser, call = deployed("unet", up_block_types=("UpBlock2D",))
    arguments: list[tuple[Any, ...]] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        exchange(graph.graph)
        graph.graph.lint()
        graph.recompile()
        convolutions = graph.graph.find_nodes(op="call_function", target=torch.ops.edadm.conv2d.default)
        arguments.extend(node.args for node in convolutions)
        return graph.forward

    with torch.no_grad():
        expected = prediction_of(denoiser(*call[0], **call[1]))
        prediction = prediction_of(torch.compile(denoiser, fullgraph=True, backend=backend)(*call[0], **call[1]))
    blocks = [module for module in denoiser.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert sum(each[5] is not None for each in arguments) == len(blocks), "time embeddings"
    assert sum(each[6] is not None for each in arguments) == len(blocks), "residuals"
    assert relative_l2(prediction, expected) < COMPILED


def test_a_model_without_quantized_layers_stays_as_it_is() -> None:
    compiled(*attention())
    assert isinstance(config.pre_grad_custom_pass, Exchanges)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    assert not any("edadm" in name for name in compiled(Plain(), ((x,), {}))[1])


def test_a_pass_that_is_there_runs_too_and_decides_about_caching() -> None:
    graphs: list[fx.Graph] = []
    with config.patch(pre_grad_custom_pass=graphs.append):
        _, operations = compiled(*attention())
        present = config.pre_grad_custom_pass
    assert graphs
    assert "edadm.attend.default" in operations
    assert isinstance(present, Exchanges)
    assert present.uuid() is None
    assert Exchanges((Exchanges(),)).uuid() is not None


def test_another_thread_compiles_the_same_graph() -> None:
    model, call = attention()
    results: list[Compiled] = []
    thread = threading.Thread(target=lambda: results.append(compiled(model, call)))
    thread.start()
    thread.join()
    assert "edadm.attend.default" in results[0][1]
