"""Joint attention over text and image of FLUX and Stable Diffusion 3. One kernel normalizes and joins the heads.

A processor of diffusers normalizes, concatenates and rotates in separate operations. torch compiles these into several
kernels, each of which reads and writes the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels

_FLUX, _JOINT = "FluxAttnProcessor", "JointAttnProcessor2_0"


class JoinedFlux:
    """A processor like diffusers' `FluxAttnProcessor` whose heads are made by `edadm_kernels.join_heads`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Returns the image tokens, and also the text tokens if they are given as a separate tensor."""
        q, k, v = ([layer(hidden_states)] for layer in (attn.to_q, attn.to_k, attn.to_v))
        norms = [[attn.norm_q], [attn.norm_k]]
        if encoder_hidden_states is not None:  # text comes first
            text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            q, k, v = ([layer(encoder_hidden_states), *x] for layer, x in zip(text, (q, k, v), strict=True))
            norms = [[attn.norm_added_q, *norms[0]], [attn.norm_added_k, *norms[1]]]
        attended = _attend(attn.heads, q, k, v, norms, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return attended
        length = encoder_hidden_states.shape[1]
        out = attn.to_out[1](attn.to_out[0](attended[:, length:].contiguous()))
        return out, attn.to_add_out(attended[:, :length].contiguous())


class JoinedStreams:
    """A processor like diffusers' `JointAttnProcessor2_0` whose heads are made by `edadm_kernels.join_heads`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *unused: Any,
        **ignored: Any,
    ) -> Any:
        """Returns the image tokens, and also the text tokens if there are any."""
        q, k, v = ([layer(hidden_states)] for layer in (attn.to_q, attn.to_k, attn.to_v))
        norms = [[attn.norm_q], [attn.norm_k]]
        if encoder_hidden_states is not None:  # text comes last
            text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            q, k, v = ([*x, layer(encoder_hidden_states)] for layer, x in zip(text, (q, k, v), strict=True))
            norms = [[*norms[0], attn.norm_added_q], [*norms[1], attn.norm_added_k]]
        attended = _attend(attn.heads, q, k, v, norms, None, None)
        length = hidden_states.shape[1]
        out = attn.to_out[1](attn.to_out[0](attended[:, :length]))
        if encoder_hidden_states is None:
            return out
        text_out = attended[:, length:]
        return out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def join_streams(model: nn.Module) -> None:
    """Sets the processors `JoinedFlux` and `JoinedStreams` on the attentions of a model that they support, in place."""
    attentions: Iterable[Any] = model.modules()
    for module in attentions:
        name = type(getattr(module, "processor", None)).__name__
        if name in (_FLUX, _JOINT) and _fits(module):
            module.processor = JoinedFlux() if name == _FLUX else JoinedStreams()


def _attend(
    heads: int,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    norms: list[list[Any]],
    mask: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Returns the attention `[N, T, C]` over pieces `[N, T_i, C]`, such as text and image."""
    queries, keys = (_joined(x, heads, of_x, rotation) for x, of_x in zip((q, k), norms, strict=True))
    values = _joined(v, heads, [None], None)
    split = [x.transpose(1, 2) for x in (queries, keys, values)]
    out = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _joined(pieces: list[Tensor], heads: int, norms: list[Any], rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns the heads of the joined pieces, `[N, T, heads, d]`; this is a view if nothing has to be computed."""
    if len(pieces) == 1 and norms[0] is None and rotation is None:
        return pieces[0].unflatten(-1, (heads, -1))
    present: list[Any] = [norm for norm in norms if norm is not None]
    weights = [norm.weight for norm in present]
    eps = present[0].eps if present else 0.0
    first, *more = (piece.contiguous() for piece in pieces)
    return kernels.join_heads(first, more[0] if more else None, heads, weights, eps, *(rotation or (None, None)))


def _fits(attn: Any) -> bool:
    """Returns whether the kernel supports the normalizations of an attention and the width of its heads."""
    has_text = getattr(attn, "add_q_proj", None) is not None
    names = ("norm_q", "norm_k", *(("norm_added_q", "norm_added_k") if has_text else ()))
    norms: list[Any] = [getattr(attn, name, None) for name in names]
    if getattr(attn, "fused_projections", False) or (getattr(attn, "add_k_proj", None) is None and has_text):
        return False
    if all(norm is None for norm in norms):
        return True
    return all(
        type(norm).__name__ == "RMSNorm"
        and norm.weight is not None
        and getattr(norm, "bias", None) is None
        and norm.eps == norms[0].eps
        for norm in norms
    )
