"""Adaptive normalizations of blocks that each embed timestep and class anew: computed for all blocks at once.

In a DiT every block has an embedder and a projection of its own, and what they compute depends on timestep and class
alone. Here a step begins with three launches for all blocks in place of three for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.quant.layers import QuantizedLayer
from edadm_kernels import pack

_NORM, _EMBEDDER = "AdaLayerNormZero", "CombinedTimestepLabelEmbeddings"
_CHUNKS = 6
"""Shift, scale and gate of the attention and of the feed-forward layer."""


class LayerStack(nn.Module):
    """Linear layers of equal sizes, each with an input, a quantizer and weights of its own.

    Args:
        layers: At least one, with products.
    """

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        super().__init__()
        first = layers[0]
        bits = first.plan.activation_bits
        assert bits is not None
        self.highest = float((1 << bits) - 1 - pack.CODE_OFFSET)
        names = ("product_scale", "product_correction", "inverse_scale", "code_shift")
        for name in names:
            self.register_buffer(name, torch.stack([layer.get_buffer(name) for layer in layers]))
        self.register_buffer("weight", torch.stack([layer.weight_int for layer in layers]).contiguous())
        biases = [layer.get_buffer("product_bias") for layer in layers] if first.bias is not None else None
        self.register_buffer("bias", None if biases is None else torch.stack(biases))

    def forward(self, x: Tensor) -> Tensor:
        """`[S, M, K]`, or `[M, K]` for all layers, to `[S, M, N]` in the element type of `x`."""
        inverse, shift = (self.get_buffer(name)[:, None, None] for name in ("inverse_scale", "code_shift"))
        codes = (torch.round(x.float() * inverse) + shift).clamp(-pack.CODE_OFFSET, self.highest).to(torch.int8)
        return kernels.linear_stack(
            codes,
            self.get_buffer("weight"),
            self.get_buffer("product_scale"),
            self.get_buffer("product_correction"),
            self._buffers["bias"],
            out_dtype=x.dtype,
        )


class Conditioning(nn.Module):
    """The embeddings and projections of every block's normalization.

    Args:
        norms: The normalizations.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        super().__init__()
        embedders = [norm.emb for norm in norms]
        self.time_proj, self.act = embedders[0].time_proj, embedders[0].timestep_embedder.act
        self.first = LayerStack([embedder.timestep_embedder.linear_1 for embedder in embedders])
        self.second = LayerStack([embedder.timestep_embedder.linear_2 for embedder in embedders])
        self.project = LayerStack([norm.linear for norm in norms])
        tables = [embedder.class_embedder.embedding_table.weight for embedder in embedders]
        self.register_buffer("classes", torch.stack([table.detach() for table in tables]))

    def forward(self, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the embeddings `[S, M, C]` and their projections `[S, M, 6 C]` for timesteps and classes `[M]`."""
        classes = self.get_buffer("classes")
        embedded = self.second(self.act(self.first(self.time_proj(timestep).to(classes.dtype))))
        embedded = embedded + classes[:, class_labels]
        return embedded, self.project(F.silu(embedded))


class ConditionedNorm(nn.Module):
    """An `AdaLayerNormZero` whose projection was computed before the first block.

    Args:
        norm: Its normalization without weights.

    Attributes:
        embedded: `[M, C]`, set at the beginning of a step.
        projected: `[M, 6 C]`, likewise.
    """

    embedded: Tensor
    projected: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def emb(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        """Returns the embedding of timestep and class, which the model's last layer reads from the first block."""
        return self.embedded

    def forward(self, x: Tensor, *unused: Any, **ignored: Any) -> tuple[Tensor, ...]:
        """Normalized and modulated `x`; gate of the attention; shift, scale and gate of the feed-forward layer."""
        shift, scale, gate, *rest = self.projected.chunk(_CHUNKS, dim=1)
        return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate, *rest)


def condition_at_once(model: nn.Module) -> None:
    """Has a deployed model compute the conditioning of all blocks at the beginning of each step, in place.

    What computes it becomes the model's `conditioning`. Nothing is changed where the blocks share one embedder; a block
    with a layer there that is not multiplied in integers goes on by itself.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == _NORM and type(getattr(child, "emb", None)).__name__ == _EMBEDDER
    ]
    served = [place for place in places if all(_is_served(layer) for layer in _layers(place[2]))]
    # the first and the last layers of a model are often left in floating point, and with them a block's embedder
    places = [place for place in served if _sizes(place[2]) == _sizes(served[0][2])]
    if len(places) < 2:
        return
    norms: list[Any] = [child for *_, child in places]
    conditioning = Conditioning(norms)
    conditioned = [ConditionedNorm(norm.norm) for norm in norms]
    for (parent, name, _), norm in zip(places, conditioned, strict=True):
        setattr(parent, name, norm)
    signature = inspect.signature(model.forward)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = signature.bind(*args, **kwargs).arguments
        embedded, projected = conditioning(values["timestep"], values["class_labels"])
        for place, norm in enumerate(conditioned):
            norm.embedded, norm.projected = embedded[place], projected[place]

    model.conditioning = conditioning
    model.register_forward_pre_hook(begin, with_kwargs=True)


def _layers(norm: Any) -> list[nn.Module]:
    embedder = norm.emb.timestep_embedder
    return [embedder.linear_1, embedder.linear_2, norm.linear]


def _is_served(layer: nn.Module) -> bool:
    return (
        isinstance(layer, QuantizedLayer)
        and layer.product is not None
        and layer.product.runs(layer)
        and layer.transform is None
    )


def _sizes(norm: Any) -> list[tuple[Any, ...]]:
    """Returns what layers that are stacked have in common."""
    layers: list[Any] = _layers(norm)
    return [(layer.weight_shape, layer.plan.activation_bits, layer.bias is None) for layer in layers]
