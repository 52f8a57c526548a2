"""Adaptive normalizations that are exchanged in the graphs that torch compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from edadm_cli.engines.cuda.compiled.plain import build_plain, many_shapes
from edadm_cli.engines.cuda.graph_passes import norm_graph
from edadm_cli.engines.cuda.graph_passes.norm_graph import replace_norms
from edadm_cli.engines.parity import relative_l2
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from tests.denoisers.families import quantized_denoiser


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_adaptive_normalizations_write_the_codes_of_the_layers_behind_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_graph, "norm_pays", lambda _: True)
    denoiser, (args, kwargs) = quantized_denoiser(family)
    model, _ = build_plain(denoiser, torch.device("cpu"), torch.float32)
    counts: list[int] = []

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        counts.append(replace_norms(graph.graph))
        graph.recompile()
        return graph.forward

    with torch.no_grad(), many_shapes():
        expected = prediction_of(model(*args, **kwargs))
        torch._dynamo.reset()
        model.compile(backend=compile_graph, dynamic=False)
        prediction = prediction_of(model(*args, **kwargs))
    assert sum(counts) >= 2
    assert relative_l2(prediction, expected) < 1e-3
