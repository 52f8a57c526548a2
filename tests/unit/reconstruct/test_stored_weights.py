"""Ranges and codes of a denoiser whose weights stay on disk, with transforms, and with layers that have no bias."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.config import BitWidth
from edadm_cli.models.stored import place_stored
from edadm_cli.models.units import trace
from edadm_cli.recipe import RangeRecipe, Recipe, TransformRule

CPU = torch.device("cpu")


class _Net(nn.Module):
    """A convolution and a linear layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.conv(x).flatten(2).transpose(1, 2))
        return result


def _params(net: nn.Module, transforms: tuple[TransformRule, ...]) -> dict[str, Tensor]:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    calls, recipe = [((x,), {})], Recipe(name="test", ranges=RangeRecipe(num_candidates=4), transforms=transforms)
    traced = trace(net, *calls[0])
    plan = plan_network(traced, recipe, BitWidth.parse("w4a8"))
    ranges = search_ranges(net, traced, plan, recipe.ranges, calls, transforms=transforms)
    return gptq_params(net, traced, plan, ranges, calls)


@pytest.mark.parametrize("transforms", [(), (TransformRule(name="input-channel-scale"),)])
def test_they_are_those_of_weights_in_memory(transforms: tuple[TransformRule, ...]) -> None:
    torch.manual_seed(0)
    net = _Net().requires_grad_(False)
    with torch.device("meta"):
        stored = _Net()
    place_stored(stored, {name: partial(_given, tensor) for name, tensor in net.named_parameters()}, CPU)
    assert not list(stored.parameters())
    expected, actual = _params(net, transforms), _params(stored, transforms)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def _given(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype)
