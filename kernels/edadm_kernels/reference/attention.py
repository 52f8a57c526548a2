r"""Attention of 8-bit operands in plain torch: what the kernels are compared with.

    q = q_scale[token] q_int,    k = k_scale[block] k_int + k_center,    v = v_scale[channel] v_int + v_center
    o = v_scale (sum_j p_j v_int_j) / (sum_j p_j) + v_center,    p_j = rne(P exp(s_j - max s))

`k_center` is the same for all keys, so it changes no softmax and is left out of the scores `s`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

KEY_BLOCK = 128
"""Number of keys that share a scale."""
SMALLEST_SCALE = 1e-20
_TOP = 127
_TOP_WEIGHT = 255 * 2**-0.25
"""The first code of the largest weight; a quarter of a power of two is left for a larger score that comes later."""


@dataclass(frozen=True)
class Codes:
    """Operands of attention in 8 bits.

    Args:
        q: Queries `[N, T, heads, d]`, int8; `row_of(d)` elements are stored per token and head.
        k: Keys `[N, S, heads, d]`, int8, stored likewise.
        v: Values `[N, heads, d, slots]`, int8, with keys in the order of `keys_of`.
        q_scale: Scale per query `[N, heads, T]`, float32.
        k_scale: Scale per `KEY_BLOCK` keys `[N, heads, blocks]`, float32.
        v_scale: Scale per channel of the values `[N, heads, d]`, float32.
        v_center: Center per channel of the values `[N, heads, d]`, float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    v_center: Tensor

    def of(self, samples: slice) -> Codes:
        """Returns the operands of some samples, as views."""
        return Codes(*(getattr(self, field.name)[samples] for field in fields(self)))


def row_of(width: int) -> int:
    """Returns the bytes of a stored row of queries or keys: copies support multiples of 16."""
    return -(-width // 16) * 16


def keys_of(slots: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the key in each of `slots` slots (a multiple of 16).

    Of every 16 keys, thread t has the scores of keys `2 t`, `2 t + 1`, `8 + 2 t` and `9 + 2 t`, but the matrix
    instruction reads weights `4 t` to `4 t + 3` from it. So values are stored in the order of the scores.
    """
    slot = torch.arange(slots, device=device)
    return slot - slot % 16 + slot // 2 % 2 * 8 + slot // 4 % 4 * 2 + slot % 2


def empty_codes(q: Tensor, k: Tensor) -> Codes:
    """Returns codes without values for `q [N, heads, T, d]` and `k [N, heads, S, d]`."""
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
    """Quantizes `q [N, heads, T, d]`, `k` and `v` `[N, heads, S, d]`, floating point, to 8 bits."""
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
    """Returns attention of 8-bit operands, `[N, T, heads, d]` in `dtype`; scores and softmax are float64."""
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
    r"""Returns attention on the grids of a model, `[N, T, heads, d]` in the type of `q`; everything is float64.

        o = p_hat v_hat,   p_hat = s_p min(rne(softmax(q_hat k_hat^T scale) / s_p), 2^b - 1)

    Args:
        q: `[N, heads, T, d]`.
        k: `[N, heads, S, d]`.
        v: `[N, heads, S, d]`.
        scale: The factor of the scores.
        scales: Scales of queries, keys and values (signed grids) and of weights (unsigned), one float32 element each.
        bits: Bits of the signed grids and of the unsigned grid, 2 to 8.
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
    """Returns the scale with which the largest magnitude gets the largest code."""
    return (largest * (1 / _TOP)).clamp_min(SMALLEST_SCALE)


def _center(x: Tensor) -> Tensor:
    """Returns the middle between the extremes of each channel, `[N, heads, d]`."""
    x = x.float()
    return (x.amin(2) + x.amax(2)) * 0.5


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Returns the symmetric codes of `x`, int8."""
    return torch.round(x * (1 / scale)).clamp(-_TOP, _TOP).to(torch.int8)
