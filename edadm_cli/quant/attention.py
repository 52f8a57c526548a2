r"""Attention with quantized products.

    S = softmax(q_hat k_hat^T / sqrt(d)),   o = p_hat v_hat,   p_hat = fake_quantize(S), zero-point 0

Queries, keys and values have signed symmetric grids, probabilities an unsigned one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.quant.buffers import keeping_float32
from edadm_cli.quant.grid import Grid, activation_grid, fake_quantize, weight_grid
from edadm_cli.quant.plan import AttentionPlan

OPERANDS = ("q", "k", "v", "p")


def operand_grid(plan: AttentionPlan, operand: str) -> Grid:
    """Returns the grid of `q`, `k`, `v` (signed) or `p` (unsigned)."""
    return activation_grid(plan.probability_bits) if operand == "p" else weight_grid(plan.activation_bits)


class AttentionProducts(nn.Module):
    """The processor of a diffusers `Attention` block, computed step by step so that subclasses can change its operands.

    `on_operand(operand, tensor)` sees q, k, v as `[batch * heads, tokens, head_dim]` and p as
    `[batch * heads, tokens, tokens]` and returns what the product uses.
    """

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """Returns the tensor that the product uses in place of an operand."""
        return tensor

    def products(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the output before its projection, `[batch, tokens, width]`, from projections of that shape.

        Args:
            attn: The `Attention` module.
            query: The projected queries.
            key: The projected keys.
            value: The projected values.
            mask: What is added to the scores, `[batch * heads, 1 or tokens, keys]`; `None` without a mask.
        """
        q, k, v = (
            self.on_operand(name, attn.head_to_batch_dim(projected))
            for name, projected in (("q", query), ("k", key), ("v", value))
        )
        p = self.on_operand("p", attn.get_attention_scores(q, k, mask))
        out: Tensor = attn.batch_to_head_dim(torch.bmm(p, v))
        return out

    def run(self, attend: Callable[[], Tensor]) -> Tensor:
        """Calls `attend` to compute the output."""
        return attend()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """Attends as diffusers' own processors do; `attn` is the `Attention` module."""
        return self.run(partial(self._attend, attn, hidden_states, encoder_hidden_states, attention_mask, temb))

    def _attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [N, H * W, C]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], hidden_states.shape[0])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        out = self.products(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), mask)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class QuantizedAttention(AttentionProducts):
    """Attention products on fixed grids, with the float32 buffers `q_scale`, `k_scale`, `v_scale` and `p_scale`.

    Offloading wraps `forward` of a module in hooks that load its tensors for the call and move the arguments. diffusers
    passes the `Attention` module to its processor, and a module with offloaded weights cannot be moved that way.
    Therefore `forward` receives a function instead.
    """

    def __init__(self, plan: AttentionPlan, scales: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.plan = plan
        for operand in OPERANDS:
            scale = torch.ones(()) if scales is None else scales[operand].detach().clone().float().reshape(())
            self.register_buffer(f"{operand}_scale", scale)

    def run(self, attend: Callable[[], Tensor]) -> Tensor:
        """Calls `attend` to compute the output while the module's hooks have its buffers in place."""
        output: Tensor = nn.Module.__call__(self, attend)
        return output

    def forward(self, attend: Callable[[], Tensor]) -> Tensor:
        """Calls `attend`; only `run` calls this method."""
        return attend()

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """Returns the fake-quantized operand."""
        scale: Tensor = getattr(self, f"{operand}_scale")
        zero = torch.zeros((), dtype=torch.int32, device=tensor.device)
        return fake_quantize(tensor, scale, zero, operand_grid(self.plan, operand))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedAttention:
        super()._apply(keeping_float32(self, fn), recurse)
        return self
