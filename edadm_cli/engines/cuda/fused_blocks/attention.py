"""Computes attention between integer projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.base import AttentionForm
from edadm_cli.engines.cuda.graph_passes.attention_graph import attend_int8_pays
from edadm_cli.engines.cuda.products.adapted import AdaptedProduct, base_of, merge_adapted
from edadm_cli.engines.cuda.products.layout import channels_last, image_of, rows_of
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.norms import Normalization
from edadm_cli.engines.cuda.products.product import FloatProduct, IntegerLinear, Product, merge, merge_floats
from edadm_cli.engines.cuda.state import Pair, PromptCache
from edadm_cli.quant.attention import QuantizedAttention


class Projections(nn.Module):
    """Linear layers that share an input; layers that prepare it in the same way form a cluster and run as one GEMM."""

    def __init__(self, layers: list[Product]) -> None:
        super().__init__()
        clusters: dict[object, list[int]] = {}
        for index, layer in enumerate(layers):
            clusters.setdefault(_reads(layer) or index, []).append(index)
        self.members = list(clusters.values())
        self.sizes = [[_outputs(layers[i]) for i in members] if len(members) > 1 else [] for members in self.members]
        self.products = nn.ModuleList(_merged([layers[i] for i in members]) for members in self.members)
        self.count = len(layers)

    @property
    def consumers(self) -> list[Product]:
        """Returns the products that read the input, one per cluster."""
        return list(self.products)  # type: ignore[arg-type]

    def forward(self, prepared: list[Tensor]) -> list[Tensor]:
        """Returns the outputs `[..., N]` of all layers; `prepared` has one prepared input per cluster."""
        outputs: list[Tensor] = [prepared[0]] * self.count
        for product, members, sizes, x in zip(self.consumers, self.members, self.sizes, prepared, strict=True):
            y = product.product(x)
            for member, piece in zip(members, y.split(sizes, dim=-1) if sizes else (y,), strict=True):
                outputs[member] = piece
        return outputs

    def of(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all layers for `x`, which is not yet prepared."""
        return self([product.prepare(x) for product in self.consumers])


class FusedAttention(nn.Module):
    """A diffusers `Attention` whose projections are products; called like the original.

    Args:
        attention: The original module, which supplies the sizes and the processor.
        layers: The products of `to_q`, `to_k`, `to_v` and `to_out.0`.
        prompt: The cache of the prompt's keys and values; `None` for self-attention.
        form: The arithmetic of those products of queries, keys and values that the recipe leaves in float.
    """

    def __init__(
        self,
        attention: Any,
        layers: tuple[Product, Product, Product, Product],
        prompt: PromptCache | None,
        form: AttentionForm = "float",
    ) -> None:
        super().__init__()
        self.form = form
        q, k, v, self.to_out = layers
        self.heads, self.scale = attention.heads, attention.scale
        self.adds_input, self.rescale = attention.residual_connection, attention.rescale_output_factor
        quantized = attention.processor if isinstance(attention.processor, QuantizedAttention) else None
        self.operands = None if quantized is None else _Operands(quantized)
        self.is_cross, self.prompt = prompt is not None, prompt
        self.inputs = Projections([q] if self.is_cross else [q, k, v])
        if prompt is not None:
            self.context = Projections([k, v])
            self.place = prompt.add(self._pair)
        self.norm: Normalization | None = None

    def use_norm(self, norm: nn.Module, lowering: Lowering) -> None:
        """Runs the GroupNorm of the attention before the projections."""
        self.norm = lowering.norm(norm, self.inputs.consumers, silu=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Returns the attention over `[N, T, C]` or `[N, C, H, W]`, in the shape of the input."""
        shape, image = hidden_states.shape, hidden_states
        if hidden_states.ndim == 4:
            image = channels_last(hidden_states)
            hidden_states = rows_of(image).view(shape[0], -1, shape[1])
        if self.norm is None:
            prepared = [product.prepare(hidden_states) for product in self.inputs.consumers]
        else:
            source = image if len(shape) == 4 else image_of(image.reshape(-1, shape[2]), shape[0], shape[1], 1)
            prepared = [rows_of(x).view(shape[0], -1, x.shape[1]) for x in self.norm(source)]
        residual = hidden_states if self.adds_input and self.rescale == 1 else None
        out = self.attend(prepared, encoder_hidden_states, attention_mask, residual)
        if self.adds_input and residual is None:
            out = out + hidden_states
        if self.rescale != 1:
            out = out / self.rescale
        return out if len(shape) == 3 else image_of(out.view(-1, shape[1]), shape[0], shape[2], shape[3])

    def attend(
        self,
        prepared: list[Tensor],
        context: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """Returns the attention after its output projection, `[N, T, C]`, plus `residual` of that shape."""
        q, *rest = self.inputs(prepared)
        if self.prompt is None:
            k, v = rest
        elif self.prompt.is_active:
            k, v = self.prompt.pair(self.place)
        else:
            assert context is not None
            k, v = self._pair(context)
        if self._pays_in_int8(q, k, mask):
            heads = [self._split(x) for x in (q, k, v)]
            attended = kernels.attend_int8(heads[0], heads[1], heads[2], self.scale)
            prepared_out = self.to_out.prepare(attended.transpose(1, 2).flatten(2))
        elif self.operands is not None and mask is None and self._has_grid_kernel(q, k):
            heads = [self._split(x) for x in (q, k, v)]
            attended = self.operands.in_integers(heads[0], heads[1], heads[2], self.scale)
            prepared_out = self.to_out.prepare(attended.transpose(1, 2).flatten(2))
        elif self._pays(q, k, v, mask):
            prepared_out = self._codes(q, k, v)
        elif self.operands is None:
            prepared_out = self.to_out.prepare(self._product(q, k, v, mask))
        else:
            prepared_out = self.to_out.prepare(self.operands(q, k, v, mask, self.heads, self.scale))
        return self.to_out.product(prepared_out, residual)

    def _pays(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
        """Returns whether one kernel computes the attention and the codes of `to_out`, and is faster."""
        plain = self.operands is None and mask is None and isinstance(self.to_out, IntegerLinear)
        return plain and kernels.attention_pays(q, k, v, self.heads, self.scale)

    def _has_grid_kernel(self, q: Tensor, k: Tensor) -> bool:
        """Returns whether a kernel multiplies operands on the model's own grids."""
        return kernels.attend_int8_takes(self._split(q), self._split(k), self.scale)

    def _pays_in_int8(self, q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
        """Returns whether 8-bit attention is requested and faster."""
        plain = self.form == "int8" and self.operands is None and mask is None
        return plain and attend_int8_pays(self._split(q), self._split(k), self.scale)

    def _codes(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        quantizer = self.to_out.quantizer
        assert quantizer is not None
        ends = (quantizer.scale, quantizer.zero_point, quantizer.num_bits)
        return kernels.attention_quantize(q, k, v, self.heads, self.scale, *ends)

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        heads = [self._split(x) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=_broadcast(mask), scale=self.scale)
        return out.transpose(1, 2).reshape(q.shape)

    def _split(self, x: Tensor) -> Tensor:
        """Returns `[N, T, heads * d]` as `[N, heads, T, d]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _pair(self, context: Tensor) -> Pair:
        k, v = self.context.of(context.contiguous())
        return k, v


class _Operands(nn.Module):
    """Computes the products of attention on operands that are rounded to their grids."""

    def __init__(self, quantized: QuantizedAttention) -> None:
        super().__init__()
        self.quantized = quantized

    def in_integers(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Returns the attention of `[N, heads, T, d]` operands, computed with products of codes and without a mask."""
        plan = self.quantized.plan
        q_scale, k_scale, v_scale, p_scale = (getattr(self.quantized, f"{name}_scale").reshape(1) for name in "qkvp")
        scales = (q_scale, k_scale, v_scale, p_scale)
        return kernels.attend_on_grids(q, k, v, scale, scales, plan.activation_bits, plan.probability_bits)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
        on_operand = self.quantized.on_operand
        q, k, v = (
            on_operand(name, x.unflatten(-1, (heads, -1)).transpose(1, 2)) for name, x in (("q", q), ("k", k), ("v", v))
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        bias = _broadcast(mask)
        if bias is not None:
            scores = scores + bias
        p = on_operand("p", scores.float().softmax(dim=-1).to(q.dtype))
        out: Tensor = torch.matmul(p, v)
        return out.transpose(1, 2).flatten(2)


def _broadcast(mask: Tensor | None) -> Tensor | None:
    """Returns the additive mask `[N, 1, T]` with an axis that broadcasts over the heads."""
    return mask[:, None] if mask is not None and mask.ndim == 3 else mask


def _reads(layer: Product) -> object:
    """Returns a grouping key: layers with equal keys can share one GEMM, and a layer with `None` is never merged."""
    base = base_of(layer)
    if isinstance(base, IntegerLinear):
        return base.quantizer.key
    as_it_stands = (
        isinstance(layer, FloatProduct) and layer.input_quantizer is None and layer.operation.kind == "linear"
    )
    return "as it stands" if as_it_stands else None


def _merged(layers: list[Product]) -> Product:
    if len(layers) == 1:
        return layers[0]
    if any(isinstance(layer, AdaptedProduct) for layer in layers):
        return merge_adapted(layers)
    integers = [layer for layer in layers if isinstance(layer, IntegerLinear)]
    return merge(integers) if integers else merge_floats([x for x in layers if isinstance(x, FloatProduct)])


def _outputs(layer: Product) -> int:
    assert isinstance(layer, IntegerLinear | FloatProduct | AdaptedProduct)
    return layer.num_outputs
