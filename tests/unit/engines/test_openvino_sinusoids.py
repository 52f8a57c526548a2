"""Embeddings of timesteps on OpenVINO keep float32 where the rest has half precision."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from edadm_cli.engines.openvino import sinusoids


class Embedder(nn.Module):
    """A timestep's embedding, as denoisers begin."""

    def __init__(self) -> None:
        super().__init__()
        self.sinusoids = Timesteps(64, True, 0)
        self.layers = TimestepEmbedding(64, 128)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.layers(self.sinusoids(timestep))


class Periodic(nn.Module):
    """An activation function that is a sine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        return torch.sin(self.layer(values))


def converted(module: nn.Module, example: Tensor) -> ov.Model:
    """The graph of a module, of static shapes."""
    graph = ov.convert_model(module.eval(), example_input=example)
    graph.reshape(list(example.shape))
    return graph


@pytest.mark.filterwarnings("ignore")
def test_a_timestep_keeps_its_embedding_in_bfloat16() -> None:
    torch.manual_seed(0)
    module, timestep = Embedder(), torch.tensor([987.0, 333.25])
    graph = converted(module, timestep)
    head = sinusoids.take_out(graph)
    assert head is not None
    core = ov.Core()
    first = core.compile_model(head, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    second = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    values = list(first([timestep.numpy()]).values())
    result = second([timestep.numpy(), *values])[0]
    expected = module(timestep).detach().numpy()
    assert np.linalg.norm(result - expected) < 0.02 * np.linalg.norm(expected)  # 0.2 with arguments in bfloat16


@pytest.mark.filterwarnings("ignore")
def test_a_sine_after_a_layer_stays_in_the_graph() -> None:
    graph = converted(Periodic(), torch.zeros(2, 4))
    assert sinusoids.take_out(graph) is None
    assert len(graph.inputs) == 1
