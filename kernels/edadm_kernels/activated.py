"""Linear layers whose outputs are activated and written as codes, on a grid as a layer of a loaded export holds it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from edadm_kernels import reference
from edadm_kernels.backend import uses_hopper
from edadm_kernels.checks import check_bits, check_device, check_numbers
from edadm_kernels.gemm import check_matrices, fill_linear
from edadm_kernels.hopper import matrices, product
from edadm_kernels.operation import operation
from edadm_kernels.product_checks import check_output, on_meta
from edadm_kernels.reference.norms import signed_codes

__all__ = ["geglu_pays", "gelu_pays", "linear_geglu_to_codes", "linear_gelu_to_codes"]

MIN_ROWS = 128
"""The least number of rows for which a product with its activation is faster than both by themselves: a tile's."""


def _empty(
    is_gated: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Checks the arguments of `linear_gelu_to_codes` or `linear_geglu_to_codes` and returns an empty output."""
    check_bits(num_bits)
    check_numbers(inverse_scale, code_shift)
    check_device(x, inverse_scale, code_shift)
    check_matrices(x, weight, scale, correction, bias)
    outputs = weight.shape[0]
    if is_gated and outputs % 2:
        raise ValueError(f"a row of gates for each row of values is expected, found {outputs} rows")
    out = x.new_empty((x.shape[0], outputs // 2 if is_gated else outputs), dtype=torch.int8)
    check_output(torch.float32, x, weight, out)
    return out


@operation("linear_gelu_to_codes", empty=partial(_empty, False), reference=reference.linear_gelu_to_codes)
def linear_gelu_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `linear_gelu` with the grid of the codes in another form.

    Args:
        x: As in `linear_gelu`, and so `weight`, `scale`, `correction`, `bias` and `num_bits`.
        inverse_scale: The inverse of the scale of the output's codes, float32, one element.
        code_shift: Their zero-point in the convention of signed codes, float32, one element.

    Returns:
        Codes `[M, N]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty(False, x, weight, scale, correction, bias, inverse_scale, code_shift, num_bits)
    if uses_hopper(x) and _takes_large(x, weight, scale, correction, bias) and matrices.takes_codes(out):
        tile = matrices.choose(x.shape[0], (weight.shape[0],), x.shape[1])
        grid = (inverse_scale, code_shift, 2**num_bits - 1)
        matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], [grid])
        return out
    y = _product(x, weight, scale, correction, bias)
    return signed_codes(F.gelu(y, approximate="tanh"), inverse_scale, code_shift, num_bits)


@operation("linear_geglu_to_codes", empty=partial(_empty, True), reference=reference.linear_geglu_to_codes)
def linear_geglu_to_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor,
    bias: Tensor | None,
    inverse_scale: Tensor,
    code_shift: Tensor,
    num_bits: int = 8,
) -> Tensor:
    """Computes `linear_geglu` for rows in the order of a layer, with the grid of the codes in another form.

    Value and gate are columns j and F + j of `linear(...)` in float32; gelu is the exact one (erf). The copies of the
    kernels alternate rows of both halves, so no other copy of the weights exists.

    Args:
        x: Codes `[M, K]`, int8, contiguous.
        weight: Codes `[2 F, K]` int8, or `[2 F, K / 2]` uint8 from `pack.pack_w4`, first all values, then all gates.
        scale: float32 `[2 F]`, in the order of the rows.
        correction: int32 `[2 F]`.
        bias: `[2 F]`, floating point.
        inverse_scale: The inverse of the scale of the output's codes, float32, one element.
        code_shift: Their zero-point in the convention of signed codes, float32, one element.
        num_bits: Bits of the output's codes, 2 to 8.

    Returns:
        Codes `[M, F]`, int8, contiguous.

    Raises:
        TypeError: A dtype is not the stated one.
        ValueError: A shape or a layout is not the stated one, or a sum could overflow.
    """
    out = _empty(True, x, weight, scale, correction, bias, inverse_scale, code_shift, num_bits)
    grid = (inverse_scale, code_shift, 2**num_bits - 1)
    if uses_hopper(x) and _takes_large(x, weight, scale, correction, bias) and matrices.takes_codes(out):
        large = matrices.choose_over_single(x.shape[0], (weight.shape[0],), x.shape[1], geglu=True)
        if large is not None:
            tile = replace(large, gates_last=True)
            matrices.launch_matrices(tile, x, [weight], [scale], [correction], [bias], [out], [grid])
            return out
    if uses_hopper(x) and product.takes(x, weight, scale, correction, bias, out):
        shape = product.Shape.matrix(*x.shape)
        fast = replace(product.choose("geglu", shape, weight.shape[0]), gates_last=True)
        product.launch_product(fast, x, weight, scale, correction, bias, out, None, None, shape, grid)
        return out
    value, gate = _product(x, weight, scale, correction, bias).chunk(2, dim=1)
    return signed_codes(value * F.gelu(gate), inverse_scale, code_shift, num_bits)


def gelu_pays(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `linear_gelu_to_codes` is one launch that is faster than a product and what torch compiles.

    The arguments are those of the operation; they may be tensors without elements, as torch has them while it traces.
    """
    meta = on_meta(x), on_meta(weight), on_meta(scale), on_meta(correction)
    added = None if bias is None else on_meta(bias)
    return _pays(x) and weight.shape[0] % 16 == 0 and _takes_large(*meta, added)


def geglu_pays(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `linear_geglu_to_codes` is one launch that is faster than a product and what torch compiles.

    The arguments are those of the operation; they may be tensors without elements, as torch has them while it traces.
    """
    if not _pays(x) or weight.shape[0] % 2:
        return False
    meta = on_meta(x), on_meta(weight), on_meta(scale), on_meta(correction)
    return product.takes(*meta, None if bias is None else on_meta(bias), out=meta[0])


def _pays(x: Tensor) -> bool:
    return uses_hopper(x) and x.shape[0] >= MIN_ROWS


def _takes_large(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> bool:
    return matrices.takes(x, [weight], (scale, correction), [bias], torch.float16)


def _product(x: Tensor, weight: Tensor, scale: Tensor, correction: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `linear(...)` in float32."""
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    fill_linear(x, weight, scale, correction, bias, None, y)
    return y
