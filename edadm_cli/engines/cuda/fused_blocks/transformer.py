"""Transformer blocks in which only normalizations read the hidden state, and only epilogues write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.fused_blocks.attention import FusedAttention
from edadm_cli.engines.cuda.products.layout import channels_last, image_of, quantizable, rows_of
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.product import IntegerLinear, Product, packed
from edadm_cli.engines.cuda.products.quantizer import Quantizer
from edadm_kernels import pack


class GatedProduct(Product):
    """A product with GEGLU in its epilogue, which takes codes and returns the codes of the next linear layer.

    Args:
        weight: The int8 codes of the first layer, `[2 F, K]`, the values before the gates.
        layer: The first layer.
        consumer: The second layer.
        pack_weight: Whether two codes are stored per byte; see `IntegerLinear`.
    """

    quantizer: Quantizer

    def __init__(self, weight: Tensor, layer: IntegerLinear, consumer: IntegerLinear, pack_weight: bool) -> None:
        super().__init__()
        self.quantizer, self.label = layer.quantizer, layer.label
        self.weight = packed(pack.pack_geglu(weight), pack_weight)
        self.scale, self.correction = pack.pack_geglu(layer.scale), pack.pack_geglu(layer.correction)
        self.bias = None if layer.bias is None else pack.pack_geglu(layer.bias)
        self.out = consumer.quantizer

    def prepare(self, x: Tensor) -> Tensor:
        """Returns the codes of `x`, in the shape of `x`."""
        return self.quantizer(quantizable(x))

    def product(self, prepared: Tensor, residual: Tensor | None = None, sample_bias: Tensor | None = None) -> Tensor:
        """Returns the second layer's codes `[..., F]` for codes `[..., K]`."""
        assert residual is None
        assert sample_bias is None
        y = kernels.linear_geglu(
            prepared.reshape(-1, prepared.shape[-1]),
            self.weight,
            self.scale,
            self.correction,
            self.bias,
            self.out.scale,
            self.out.zero_point,
            self.out.num_bits,
        )
        return y.view(*prepared.shape[:-1], y.shape[-1])


class FusedFeedForward(nn.Module):
    """Computes a diffusers `FeedForward` with GEGLU or GELU.

    Args:
        layers: The layers before and after the activation.
        activation: `geglu`, `gelu` or `gelu-tanh`.
        gated: The fused first half; `None` if the layers do not allow it.
    """

    def __init__(self, layers: tuple[Product, Product], activation: str, gated: GatedProduct | None) -> None:
        super().__init__()
        self.project, self.out = layers
        self.activation, self.gated = activation, gated
        if gated is not None:
            assert isinstance(self.project, IntegerLinear)
            del self.project.weight  # held by `gated` in another order

    def forward(self, hidden_states: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        """Returns the output `[..., C]` for `hidden_states` `[..., C]`."""
        return self.feed(self.project.prepare(hidden_states), None)

    def feed(self, prepared: Tensor, residual: Tensor | None, reader: IntegerLinear | None = None) -> Tensor:
        """Returns the output of both layers for the prepared input of the first one, plus `residual`.

        With a `reader`, which only a gated layer takes, the codes of that layer are returned in its place.
        """
        if self.gated is not None:
            assert isinstance(self.out, IntegerLinear)
            return self.out.product(self.gated.product(prepared), residual, reader=reader)
        assert reader is None
        y = self.project.product(prepared)
        if self.activation == "geglu":
            value, gate = y.chunk(2, dim=-1)
            y = value * F.gelu(gate)
        else:
            y = F.gelu(y, approximate="tanh" if self.activation == "gelu-tanh" else "none")
        return self.out.product(self.out.prepare(y), residual)


class FusedTransformerBlock(nn.Module):
    """Computes a diffusers `BasicTransformerBlock` with plain layer norms, whose residual sums are epilogues.

    Args:
        block: The original block, which supplies the norms.
        attentions: The self-attention, and the cross-attention if the block has one.
        feed_forward: The feed-forward layer.
        lowering: It joins the normalizations with the layers that read them.

    Attributes:
        reader: The only layer that reads the output, if the block returns its codes.
    """

    reader: IntegerLinear | None

    def __init__(
        self, block: Any, attentions: list[FusedAttention], feed_forward: FusedFeedForward, lowering: Lowering
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        norms = (block.norm1, block.norm2)
        self.norms = nn.ModuleList(
            lowering.norm(norm, attention.inputs.consumers, silu=False)
            for norm, attention in zip(norms, attentions, strict=False)
        )
        self.feed_forward = feed_forward
        self.last_norm = lowering.norm(block.norm3, [feed_forward.project], silu=False)
        self.reader = None

    def write_for(self, reader: Product) -> bool:
        """Makes the block return the codes of its only reader, where the products can; returns whether they can."""
        if isinstance(reader, IntegerLinear) and self.feed_forward.gated is not None:
            self.__dict__["reader"] = reader  # it is no part of the block
        return self.reader is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the hidden states `[N, T, C]` after the block, or their codes for the `reader`."""
        masks = (attention_mask, encoder_attention_mask)
        for norm, attention, mask in zip(self.norms, self.attentions, masks, strict=False):
            assert isinstance(attention, FusedAttention)
            hidden_states = attention.attend(norm(hidden_states), encoder_hidden_states, mask, hidden_states)
        (prepared,) = self.last_norm(hidden_states)
        return self.feed_forward.feed(prepared, hidden_states, self.reader)


class FusedTransformer2D(nn.Module):
    """Computes a diffusers `Transformer2DModel` over images: normalization, projection, blocks, projection and sum.

    Tokens are rows of the channels-last image, so nothing is permuted or copied on the way in or out.

    Args:
        model: The original model, which supplies the norm and the blocks, which are replaced already.
        layers: The products of `proj_in` and `proj_out`.
        lowering: It joins the normalization with the layer that reads it.
    """

    def __init__(self, model: Any, layers: tuple[Product, Product], lowering: Lowering) -> None:
        super().__init__()
        self.proj_in, self.proj_out = layers
        self.norm = lowering.norm(model.norm, [self.proj_in], silu=False)
        self.transformer_blocks = model.transformer_blocks
        self.has_convolutions = not model.use_linear_projection
        last = self.transformer_blocks[-1] if len(self.transformer_blocks) else None
        self.last_writes_codes = isinstance(last, FusedTransformerBlock) and last.write_for(self.proj_out)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns an image `[N, C, H, W]`, in a tuple or in the output class of the original, for such an image."""
        image = channels_last(hidden_states)
        batch, _, height, width = image.shape
        (prepared,) = self.norm(image)
        if self.has_convolutions:
            projected = self.proj_in.product(prepared)
            rows = rows_of(channels_last(projected))
        else:
            rows = self.proj_in.product(rows_of(prepared))
        tokens = rows.view(batch, height * width, -1)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                attention_mask=_as_bias(attention_mask, tokens.dtype),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=_as_bias(encoder_attention_mask, tokens.dtype),
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        rows = tokens.reshape(batch * height * width, -1)
        project = self.proj_out.product if self.last_writes_codes else self.proj_out
        if self.has_convolutions:
            out = project(image_of(rows, batch, height, width), image)
        else:
            out = image_of(project(rows, rows_of(image)), batch, height, width)
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask `[N, T]` of ones and zeros as an additive mask `[N, 1, T]`, and any other mask unchanged."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
