"""Attention that is exchanged in the graphs that torch compiles, whatever processor a model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.graph_passes import attention_graph
from edadm_cli.engines.cuda.graph_passes.attention_graph import replace_attention
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import UsageError


class Attention(nn.Module):
    """Two heads over columns of one projection."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in x.chunk(3, dim=2))
        return scaled_dot_product_attention(q, k, v, **self.arguments).transpose(1, 2).flatten(2)


def exchanged(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The result of a model compiled with its attention in eight bits, and how many attentions were replaced."""
    counts: list[int] = []

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        counts.append(replace_attention(graph.graph, "int8"))
        graph.recompile()
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=compile_graph, fullgraph=True)(x), sum(counts)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_graph, "attend_int8_pays", lambda *_: True)


@pytest.mark.parametrize("arguments", [{}, {"scale": 0.4}, {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}])
def test_attention_becomes_the_operation_in_eight_bits(arguments: dict[str, Any]) -> None:
    x = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0))
    model = Attention(**arguments)
    result, count = exchanged(model, x)
    expected = model(x)
    assert count == 1
    assert 0 < (result - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": torch.zeros(40, 40)}])
def test_what_the_operation_cannot_express_stays(arguments: dict[str, Any]) -> None:
    x = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0))
    assert exchanged(Attention(**arguments), x)[1] == 0


class Codes(nn.Module):
    """Attention in float16 whose result only quantized layers read: all tokens, or the first 12 and the others."""

    def __init__(self, cuts: list[int], has_mask: bool) -> None:
        super().__init__()
        self.cuts, self.has_mask = cuts, has_mask
        for place in range(len(cuts)):
            self.register_buffer(f"inverse_{place}", torch.tensor(20.0 + place))
            self.register_buffer(f"shift_{place}", torch.tensor(-5.0 - place))

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in x.chunk(3, dim=2))
        bias = mask.view(2, 1, -1, 40) if self.has_mask else None
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(2, -1, 32).to(q.dtype)
        results, first = [], 0
        for place, cut in enumerate(self.cuts):
            piece = out[:, first:cut] if len(self.cuts) > 1 else out
            codes = torch.round(piece.float() * getattr(self, f"inverse_{place}")) + getattr(self, f"shift_{place}")
            results.append(codes.clamp(-128, 127 if place == 0 else -113).to(torch.int8))
            first = cut
        return results


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("cuts", [[40], [12, 40], [12, 30]])
def test_attention_writes_the_codes_of_the_layers_behind_it(
    cuts: list[int], has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_graph, "attend_pays", lambda *_: True)
    x = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.zeros(2, 40, dtype=torch.float16)
    mask[0, 30:] = -10000.0
    model, targets = Codes(cuts, has_mask), []

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        replace_attention(graph.graph, "float")
        graph.recompile()
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    results = torch.compile(model, backend=compile_graph, fullgraph=True)(x, mask)
    covers_all = cuts[-1] == 40
    assert any("attend_to_codes" in target for target in targets) == covers_all
    assert any("attend.default" in target for target in targets) != covers_all
    assert all(torch.equal(a, b) for a, b in zip(results, model(x, mask), strict=True))


def test_an_engine_without_a_form_of_attention_names_the_one_that_has_it() -> None:
    with pytest.raises(UsageError, match=r"reference.*not in int8"):
        ReferenceEngine().require_attention("int8")
    CudaEngine().require_attention("int8")
