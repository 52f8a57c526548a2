"""Codes and fake-quantize: one meaning, idempotent, zero exact, and the gradients of the learned form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edadm_cli.quant.grid import (
    Grid,
    _LearnedFakeQuantize,
    activation_grid,
    dequantize,
    fake_quantize,
    learned_fake_quantize,
    quantize,
    weight_grid,
)

BITS = range(2, 9)


@st.composite
def quantizers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """A tensor that overflows its grid on both sides now and then, and the grid."""
    grid = Grid(draw(st.sampled_from(BITS)), signed=draw(st.booleans()))
    scale = torch.tensor(draw(st.floats(1e-6, 1e3)), dtype=torch.float32)
    zero_point = draw(st.integers(grid.quant_min, grid.quant_max))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.floats(0.1, 3.0)) * (grid.quant_max - grid.quant_min)
    x = torch.randn(64, generator=generator) * spread * scale
    return x, scale, torch.tensor(zero_point, dtype=torch.int32), grid


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_of_b_bits_has_2_to_the_b_codes(bits: int) -> None:
    for grid in (weight_grid(bits), activation_grid(bits)):
        assert grid.quant_max - grid.quant_min + 1 == 2**bits
    assert weight_grid(bits).quant_min == -(2 ** (bits - 1))
    assert activation_grid(bits).quant_min == 0


@given(quantizers())
@settings(max_examples=200)
def test_fake_quantize_is_dequantize_of_whole_codes_within_the_grid(
    case: tuple[Tensor, Tensor, Tensor, Grid],
) -> None:
    x, scale, zero_point, grid = case
    codes = quantize(x, scale, zero_point, grid)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.quant_min
    assert codes.max() <= grid.quant_max
    assert torch.equal(fake_quantize(x, scale, zero_point, grid), dequantize(codes, scale, zero_point))


@given(quantizers())
@settings(max_examples=100)
def test_fake_quantize_is_idempotent_keeps_zero_and_order(case: tuple[Tensor, Tensor, Tensor, Grid]) -> None:
    x, scale, zero_point, grid = case
    once = fake_quantize(x, scale, zero_point, grid)
    assert torch.equal(fake_quantize(once, scale, zero_point, grid), once)
    assert fake_quantize(torch.zeros(3), scale, zero_point, grid).tolist() == [0, 0, 0]
    ordered = fake_quantize(x.sort().values, scale, zero_point, grid)
    assert bool((ordered.diff() >= 0).all())


@given(quantizers())
@settings(max_examples=100)
def test_inside_the_range_the_error_is_at_most_half_a_step(
    case: tuple[Tensor, Tensor, Tensor, Grid],
) -> None:
    x, scale, zero_point, grid = case
    low, high = ((bound - zero_point) * scale for bound in (grid.quant_min, grid.quant_max))
    inside = x.clamp(min=low, max=high)
    error = (fake_quantize(inside, scale, zero_point, grid) - inside).abs()
    assert error.max() <= scale * 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_quantized_in_float32_and_come_back_narrow(dtype: torch.dtype) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = torch.tensor(0.0137), torch.tensor(91, dtype=torch.int32)
    actual = fake_quantize(x, scale, zero_point, activation_grid(8))
    assert actual.dtype == dtype
    assert torch.equal(actual, fake_quantize(x.float(), scale, zero_point, activation_grid(8)).to(dtype))


def _learned_case(grid: Grid, zero_point: int, drop: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, 3, 5, generator=generator) * 1.3
    dropped = torch.rand(x.shape, generator=generator) < 0.5 if drop else None
    scale = torch.tensor(4.0 / (grid.quant_max - grid.quant_min)) * 0.77
    return x, scale, torch.tensor(zero_point, dtype=torch.int32), dropped


CASES = [(activation_grid(4), 7), (activation_grid(8), 0), (weight_grid(4), 0), (activation_grid(2), 3)]


@pytest.mark.parametrize(("grid", "zero_point"), CASES)
def test_the_learned_form_computes_the_same_values(grid: Grid, zero_point: int) -> None:
    x, scale, zero, dropped = _learned_case(grid, zero_point, drop=True)
    assert dropped is not None
    actual = learned_fake_quantize(x, scale, zero, grid)
    assert torch.equal(actual, fake_quantize(x, scale, zero, grid))
    partly = learned_fake_quantize(x, scale, zero, grid, dropped)
    assert torch.equal(partly[dropped], x[dropped]), "dropped elements pass untouched"
    assert torch.equal(partly[~dropped], actual[~dropped])


@pytest.mark.parametrize(("grid", "zero_point"), CASES)
@pytest.mark.parametrize("drop", [False, True])
def test_gradients_are_those_of_torchs_learnable_fake_quantize(grid: Grid, zero_point: int, drop: bool) -> None:
    x, scale, zero, dropped = _learned_case(grid, zero_point, drop)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    ours_x, ours_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    learned_fake_quantize(ours_x, ours_scale, zero, grid, dropped).backward(upstream)
    theirs_x, theirs_scale = x.clone().requires_grad_(), scale.reshape(1).clone().requires_grad_()
    quantized = torch._fake_quantize_learnable_per_tensor_affine(
        theirs_x, theirs_scale, zero.reshape(1).float(), grid.quant_min, grid.quant_max, 1.0
    )
    kept = quantized if dropped is None else torch.where(dropped, theirs_x, quantized)
    kept.backward(upstream)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    torch.testing.assert_close(ours_scale.grad, theirs_scale.grad[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "zero_point"), CASES)
def test_clipped_values_teach_the_scale_by_their_slope(grid: Grid, zero_point: int) -> None:
    """Where everything is clipped the function is linear in the scale, so differences are exact."""
    zero = torch.tensor(zero_point, dtype=torch.int32)
    x = torch.tensor([-1e4, 1e4])
    scale = torch.tensor(0.5, requires_grad=True)
    learned_fake_quantize(x, scale, zero, grid).sum().backward()
    step = 2.0**-6
    above, below = (fake_quantize(x, torch.tensor(0.5 + side), zero, grid).sum() for side in (step, -step))
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float((above - below) / (2 * step)))


def test_clipped_values_teach_their_input_nothing() -> None:
    x = torch.tensor([-5.0, 0.3, 9.0], requires_grad=True)
    zero = torch.tensor(4, dtype=torch.int32)
    learned_fake_quantize(x, torch.tensor(0.25), zero, activation_grid(4)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("grid", "zero_point"), CASES)
@pytest.mark.parametrize("drop", [False, True])
def test_a_cpu_computes_the_bits_of_the_form_for_gpus(
    grid: Grid, zero_point: int, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, scale, zero, dropped = _learned_case(grid, zero_point, drop)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).transpose(0, 2).contiguous()
    results = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr("edadm_cli.quant.grid._LearnedFakeQuantizeOnCpu", _LearnedFakeQuantize)
        xs, scales = x.clone().requires_grad_(), scale.clone().requires_grad_()
        output = learned_fake_quantize(xs, scales, zero, grid, dropped)
        output.backward(upstream.transpose(0, 2))
        results.append((output.detach(), xs.grad, scales.grad))
    for on_cpu, expected in zip(*results, strict=True):
        assert torch.equal(on_cpu, expected)


def _traced(function: Callable[..., Any], _: Tensor) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True)


@pytest.mark.parametrize("drop", [False, True])
def test_compiled_as_on_a_gpu_it_gives_the_same_values_and_gradients(
    drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = activation_grid(4)
    x, scale, zero, dropped = _learned_case(grid, 7, drop)
    results = []
    for compiles in (False, True):
        if compiles:  # one graph whatever the sizes, through the tracing that a GPU's kernels come from
            monkeypatch.setattr("edadm_cli.quant.grid._LearnedFakeQuantizeOnCpu", _LearnedFakeQuantize)
            monkeypatch.setattr("edadm_cli.quant.grid.fused", _traced)
        xs, scales = x.clone().requires_grad_(), scale.clone().requires_grad_()
        output = learned_fake_quantize(xs, scales, zero, grid, dropped)
        output.square().sum().backward()
        results.append((output.detach(), xs.grad, scales.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_learned_fake_quantize_compiles_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each unit of a denoiser brings other shapes, and torch refuses after a few compilations."""
    torch.compiler.reset()
    compiled = cache(lambda function: torch.compile(function, dynamic=True, fullgraph=True, backend="eager"))
    monkeypatch.setattr("edadm_cli.quant.grid._LearnedFakeQuantizeOnCpu", _LearnedFakeQuantize)
    monkeypatch.setattr("edadm_cli.quant.grid.fused", lambda function, _: compiled(function))
    scale, zero_point = torch.tensor(0.1, requires_grad=True), torch.tensor(3, dtype=torch.int32)
    for rank in range(1, 11):
        x = torch.randn(*range(2, 2 + min(rank, 5)), *[2] * (rank - 5), requires_grad=True)
        learned_fake_quantize(x, scale, zero_point, activation_grid(4)).sum().backward()
    torch.compiler.reset()
