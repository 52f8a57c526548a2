"""Single-stream blocks of FLUX, in which the product of the feed-forward half writes its output as codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct, as_rows
from edadm_cli.quant.layers import QuantizedLayer

_BLOCK = "FluxSingleTransformerBlock"


class FluxSingleBlock(nn.Module):
    """Computes a diffusers `FluxSingleTransformerBlock` whose two halves are two tensors of codes.

    Queries, keys, values and the feed-forward half are computed in one launch. The last layer reads the codes of both
    halves from two tensors, so nothing is concatenated.

    Args:
        block: The original block, deployed. Its `proj_mlp` shares its input with queries, keys and values.
        product: It multiplies the codes of the block's layers.

    Attributes:
        replaces: The class of the original block, which has the same arguments and results.
    """

    def __init__(self, block: Any, product: KernelProduct) -> None:
        super().__init__()
        self.replaces: type[nn.Module] = type(block)
        self.norm, self.attn, self.product = block.norm, block.attn, product
        self.proj_mlp, self.proj_out = block.proj_mlp, block.proj_out

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns text tokens `[N, L, C]` and image tokens `[N, T, C]` for tokens of the same shapes."""
        text_length = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        hidden = self._feed(normed)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        y = kernels.linear_joined(
            as_rows(self.product.codes(self.proj_out, attended)),
            hidden,
            self.product.weight(self.proj_out),
            self.proj_out.product_scale,
            self.proj_out.product_correction,
            self.proj_out.product_bias,
            out_dtype=normed.dtype,
        )
        out = residual + gate.unsqueeze(1) * y.view(residual.shape)
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        return out[:, :text_length], out[:, text_length:]

    def _feed(self, normed: Tensor) -> Tensor:
        """Returns the codes of the feed-forward half, `[M, F]`, and holds queries, keys and values for their layers."""
        shared, last = self.proj_mlp.member.shared, self.proj_mlp.member.place
        layers = [*(layer for place, layer in enumerate(shared.layers) if place != last), self.proj_mlp]
        codes = self.product.codes(self.proj_mlp, normed)
        *outputs, hidden = kernels.linears_gelu(
            as_rows(codes),
            [self.product.weight(layer) for layer in layers],
            [layer.product_scale for layer in layers],
            [layer.product_correction for layer in layers],
            [layer.product_bias for layer in layers],
            self.proj_out.input_scale.reshape(1),
            self.proj_out.input_zero_point.reshape(1),
            self.proj_out.plan.activation_bits,
            out_dtype=normed.dtype,
        )
        views = [y.view(*normed.shape[:-1], y.shape[-1]) for y in outputs]
        shared.hold(normed, [*views[:last], None, *views[last:]])
        return hidden


def fuse_single_blocks(model: nn.Module, product: KernelProduct) -> None:
    """Replaces the single-stream blocks of a deployed FLUX that `FluxSingleBlock` supports, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == _BLOCK and _fits(child):
                setattr(parent, name, FluxSingleBlock(child, product))


def _fits(block: Any) -> bool:
    member = getattr(block.proj_mlp, "member", None)
    return (
        member is not None
        and member.shared.is_active
        and isinstance(block.act_mlp, nn.GELU)
        and block.act_mlp.approximate == "tanh"
        and _is_served(block.proj_mlp)
        and _is_served(block.proj_out)
        and block.proj_out.transform is None
    )


def _is_served(layer: nn.Module) -> bool:
    """Returns whether a layer is an integer linear one on a device whose kernels apply activation and quantizer."""
    return (
        isinstance(layer, QuantizedLayer)
        and layer.operation.kind == "linear"
        and layer.product is not None
        and layer.product.runs(layer)
        and kernels.fuses_gelu(layer.weight_codes)
    )
