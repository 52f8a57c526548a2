"""Group normalization from statistics of rows computes the same as OpenVINO's own form."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.openvino import group_norm


class Normalized(nn.Module):
    """A convolution and the normalization after it, as in a residual block."""

    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels, eps=1e-5)
        nn.init.normal_(self.convolution.weight, std=(9 * channels) ** -0.5)
        assert self.convolution.bias is not None
        nn.init.normal_(self.convolution.bias, mean=mean)
        nn.init.normal_(self.norm.weight, mean=1, std=0.1)
        nn.init.normal_(self.norm.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.convolution(x)))


def graphs(module: nn.Module, x: Tensor) -> tuple[ov.Model, ov.Model]:
    """Returns the graph of a module with static shapes, and the same graph with rewritten normalizations."""
    graph = ov.convert_model(module.eval(), example_input=x)
    graph.reshape(list(x.shape))
    rewritten = graph.clone()
    assert group_norm.normalize_by_rows(rewritten) == 1
    return graph, rewritten


def error(graph: ov.Model, x: Tensor, expected: np.ndarray, precision: str) -> float:
    """Returns the relative L2 error of a graph's output."""
    output = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})([x.numpy()])[0]
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("shape", [(2, 32, 16, 24), (1, 64, 5, 7)])
def test_it_is_as_near_to_float32_as_openvino_itself(shape: tuple[int, ...], mean: float) -> None:
    torch.manual_seed(0)
    module, x = Normalized(shape[1], mean), torch.randn(shape)
    expected = module(x).detach().numpy()
    graph, rewritten = graphs(module, x)
    assert error(rewritten, x, expected, "f32") < 1e-4
    assert error(rewritten, x, expected, "bf16") < 1.5 * error(graph, x, expected, "bf16") + 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_sequence_keeps_openvino_s_own_form() -> None:
    graph = ov.convert_model(nn.GroupNorm(4, 16).eval(), example_input=torch.zeros(1, 16, 10))
    graph.reshape([1, 16, 10])
    assert group_norm.normalize_by_rows(graph) == 0
