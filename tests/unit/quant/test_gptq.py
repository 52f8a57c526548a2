"""GPTQ: nearest rounding where columns do not meet, less error of the outputs where they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.quant.gptq import gptq_codes, input_columns
from edadm_cli.quant.grid import weight_grid
from edadm_cli.quant.operation import Operation

GRID = weight_grid(3)


def _nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale[:, None]).round().clamp(GRID.quant_min, GRID.quant_max).to(torch.int8)


def _case(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, columns, generator=generator)
    mixing = torch.randn(columns, columns // 4, generator=generator)
    x = torch.randn(500, columns // 4, generator=generator) @ mixing.T + 0.1 * torch.randn(
        500, columns, generator=generator
    )
    return weight, weight.abs().amax(dim=1) / GRID.quant_max, x


def test_uncorrelated_columns_are_rounded_to_nearest() -> None:
    weight, scale, _ = _case(40)
    codes = gptq_codes(weight, scale, torch.diag(torch.linspace(0.1, 9, 40)), GRID)
    assert torch.equal(codes, _nearest(weight, scale))


@pytest.mark.parametrize("columns", [40, 300])
def test_errors_of_outputs_fall_where_columns_are_correlated(columns: int) -> None:
    weight, scale, x = _case(columns)
    codes = gptq_codes(weight, scale, x.T @ x, GRID)
    assert codes.dtype == torch.int8
    assert GRID.quant_min <= int(codes.min()) <= int(codes.max()) <= GRID.quant_max

    def error(rounded: Tensor) -> float:
        return float(((rounded * scale[:, None] - weight) @ x.T).square().sum())

    assert error(codes) < 0.5 * error(_nearest(weight, scale))


def test_columns_of_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, scale, x = _case(40)
    x[:, 7] = 0
    assert torch.equal(gptq_codes(weight, scale, x.T @ x, GRID)[:, 7], _nearest(weight, scale)[:, 7])
    assert torch.equal(gptq_codes(weight, scale, torch.zeros(40, 40), GRID), _nearest(weight, scale))


def test_the_columns_of_an_input_give_the_output() -> None:
    conv, linear = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        for layer, x in ((conv, torch.randn(2, 6, 8, 8)), (linear, torch.randn(2, 3, 6))):
            columns = input_columns(x, Operation.of(layer), layer.weight.shape[2:])
            product = columns @ layer.weight.flatten(1).T
            expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1) if layer is conv else layer(x).flatten(0, 1)
            torch.testing.assert_close(product, expected)
