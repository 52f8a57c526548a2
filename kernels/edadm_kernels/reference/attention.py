r"""Attention of eight-bit operands in plain torch: what the kernels are checked against.

    q = q_scale[token] q_int,    k = k_scale[block] k_int + k_center,    v = v_scale[channel] v_int + v_center
    o = v_scale (sum_j p_j v_int_j) / (sum_j p_j) + v_center,    p_j = rne(P exp(s_j - max s))

`k_center` is the same for all keys, so it changes no softmax and is left out of the scores `s`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEY_BLOCK = 128
"""Keys that share a scale."""
SMALLEST_SCALE = 1e-20
_TOP = 127
_TOP_WEIGHT = 255 * 2**-0.25
"""The largest weight as the kernel starts: a quarter of a power of two is left for a larger one to come."""


@dataclass(frozen=True)
class Codes:
    """Operands of attention in eight bits.

    Args:
        q: `[N, T, heads, d]`, int8; the last dimension is stored with `row_of(d)` elements.
        k: `[N, S, heads, d]`, int8, stored alike.
        v: `[N, heads, d, slots]`, int8, keys in the order of `keys_of`.
        q_scale: `[N, heads, T]`, float32.
        k_scale: `[N, heads, blocks]`, float32, one for `KEY_BLOCK` keys.
        v_scale: `[N, heads, d]`, float32.
        v_center: `[N, heads, d]`, float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    v_center: Tensor


def row_of(width: int) -> int:
    """Bytes of a stored row of queries or keys: copies want a multiple of 16."""
    return -(-width // 16) * 16


def keys_of(slots: int, device: torch.device | str = "cpu") -> Tensor:
    """The key that each slot of `slots` (a multiple of 16) holds.

    A thread holds scores of keys `2 t`, `2 t + 1`, `8 + 2 t` and `9 + 2 t` of 16, and the matrix instruction takes
    weights `4 t` to `4 t + 3` from it.
    """
    slot = torch.arange(slots, device=device)
    return slot - slot % 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2


def empty_codes(q: Tensor, k: Tensor) -> Codes:
    """Codes to be filled for `q [N, heads, T, d]` and `k [N, heads, S, d]`."""
    samples, heads, queries, width = q.shape
    keys = k.shape[2]

    def rows(tokens: int) -> Tensor:
        stored = torch.empty(samples, tokens, heads, row_of(width), dtype=torch.int8, device=q.device)
        return stored[..., :width]

    def floats(size: int) -> Tensor:
        return torch.empty(samples, heads, size, dtype=torch.float32, device=q.device)

    v = torch.empty(samples, heads, width, row_of(keys), dtype=torch.int8, device=q.device)
    scales = (floats(queries), floats(-(-keys // KEY_BLOCK)), floats(width), floats(width))
    return Codes(rows(queries), rows(keys), v, *scales)


def attention_codes(q: Tensor, k: Tensor, v: Tensor) -> Codes:
    """Eight-bit operands of `q [N, heads, T, d]`, `k` and `v` `[N, heads, S, d]`, floating point."""
    codes = empty_codes(q, k)
    keys, blocks = k.shape[2], codes.k_scale.shape[2]
    queries = q.float()
    codes.q_scale.copy_(_scale(queries.abs().amax(3)))
    codes.q.copy_(_rounded(queries, codes.q_scale[..., None]).transpose(1, 2))
    centered = k.float() - _center(k)[:, :, None]
    padded = torch.nn.functional.pad(centered.abs().amax(3), (0, blocks * KEY_BLOCK - keys))
    codes.k_scale.copy_(_scale(padded.unflatten(2, (blocks, KEY_BLOCK)).amax(3)))
    per_key = codes.k_scale.repeat_interleave(KEY_BLOCK, 2)[:, :, :keys, None]
    codes.k.copy_(_rounded(centered, per_key).transpose(1, 2))
    values = v.float()
    codes.v_center.copy_(_center(v))
    spread = (values.amax(2) - values.amin(2)) * (0.5 / _TOP)
    codes.v_scale.copy_(spread.clamp_min(SMALLEST_SCALE))
    rounded = _rounded(values - codes.v_center[:, :, None], codes.v_scale[:, :, None])
    slots = codes.v.shape[3]
    codes.v.copy_(torch.nn.functional.pad(rounded.transpose(2, 3), (0, slots - keys))[..., keys_of(slots, v.device)])
    return codes


def attend_codes(codes: Codes, scale: float, dtype: torch.dtype) -> Tensor:
    """Attention of eight-bit operands, `[N, T, heads, d]` in `dtype`; scores and softmax in float64."""
    keys, slots = codes.k.shape[1], codes.v.shape[3]
    per_key = codes.k_scale.repeat_interleave(KEY_BLOCK, 2)[:, :, None, :keys].double()
    products = codes.q.transpose(1, 2).double() @ codes.k.permute(0, 2, 3, 1).double()
    scores = products * codes.q_scale[..., None].double() * per_key * scale
    weights = torch.round(_TOP_WEIGHT * (scores - scores.amax(3, keepdim=True)).exp())
    order = keys_of(slots, codes.v.device)
    values = torch.empty_like(codes.v, dtype=torch.float64)
    values[..., order] = codes.v.double()
    sums = weights @ values[..., :keys].transpose(2, 3)
    attended = sums / weights.sum(3, keepdim=True) * codes.v_scale[:, :, None] + codes.v_center[:, :, None]
    return attended.transpose(1, 2).to(dtype).contiguous()


def attend_on_grids(
    q: Tensor, k: Tensor, v: Tensor, scale: float, scales: tuple[Tensor, Tensor, Tensor, Tensor], bits: tuple[int, int]
) -> Tensor:
    r"""Attention on a model's own grids, `[N, T, heads, d]` in the type of `q`; everything in float64.

        o = p_hat v_hat,   p_hat = s_p min(rne(softmax(q_hat k_hat^T scale) / s_p), 2^b - 1)

    Args:
        q: `[N, heads, T, d]`.
        k: `[N, heads, S, d]`.
        v: `[N, heads, S, d]`.
        scale: The factor of the scores.
        scales: The scales of queries, keys, values (signed grids) and weights (unsigned), one element each, float32.
        bits: The bits of the signed grids and of the unsigned one, 2 to 8.
    """
    low, high = -(1 << (bits[0] - 1)), (1 << (bits[0] - 1)) - 1

    def on_grid(x: Tensor, step: Tensor) -> Tensor:
        codes = torch.round(x.float() * step.reshape(()).reciprocal()).clamp(low, high)
        return codes.double() * step.reshape(()).double()

    queries, keys, values = (on_grid(x, step) for x, step in zip((q, k, v), scales, strict=False))
    weights = (queries @ keys.transpose(2, 3) * scale).softmax(dim=-1)
    step = scales[3].reshape(()).double()
    codes = torch.round(weights / step).clamp_max((1 << bits[1]) - 1)
    return ((codes * step) @ values).transpose(1, 2).to(q.dtype).contiguous()


def _scale(largest: Tensor) -> Tensor:
    return (largest * (1 / _TOP)).clamp_min(SMALLEST_SCALE)


def _center(x: Tensor) -> Tensor:
    """The middle between the extremes of each channel, `[N, heads, d]`."""
    x = x.float()
    return (x.amin(2) + x.amax(2)) * 0.5


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x * (1 / scale)).clamp(-_TOP, _TOP).to(torch.int8)
