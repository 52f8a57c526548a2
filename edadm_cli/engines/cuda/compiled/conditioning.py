"""Computes the conditioning of the adaptive normalizations of all blocks at once.

In a DiT, every block has its own embedder and projection, whose outputs depend only on timestep and class. Here a step
begins with three kernel launches for all blocks together, in place of three launches per block. In Stable Diffusion 3,
all projections read one embedding of timestep and prompt. Here one launch computes those with equal sizes.
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
_PROJECTED = ("AdaLayerNormZero", "SD35AdaLayerNormZeroX", "AdaLayerNormContinuous")
_EMBEDDED = "SD3Transformer2DModel"
_CHUNKS = 6
"""The number of outputs of a projection: shift, scale and gate of the attention and of the feed-forward layer."""


class LayerStack(nn.Module):
    """Runs linear layers of equal sizes in one launch. Each has its own input, quantizer and weights.

    Args:
        layers: The S layers, at least one, all of which run as products.
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
        """Returns the outputs `[S, M, N]`, in the type of `x`, for inputs `[S, M, K]` or one common input `[M, K]`."""
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
    """Computes what the normalizations of all blocks read, at the beginning of a step."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple[torch.Size, ...], list[Tensor]] | None = None

    def hold_outputs(self) -> None:
        """Makes `held` return outputs of one shape at fixed addresses, where graphs of single blocks can read them."""
        self._held = {}

    def held(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the outputs of `forward` as the blocks read them: copies at fixed addresses after `hold_outputs`."""
        if self._held is None:
            return outputs
        places = self._held.setdefault(tuple(x.shape for x in outputs), [])
        if not places:
            places += [x.clone() for x in outputs]
        return [place.copy_(x) for place, x in zip(places, outputs, strict=True)]


class BlockEmbeddings(Conditioning):
    """Computes the embeddings and projections of all blocks of a DiT.

    Args:
        norms: The normalizations of the S blocks.
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


class Projections(Conditioning):
    """Computes the projections of one embedding for all normalizations.

    Args:
        groups: The layers; those of a group have equal sizes.
    """

    def __init__(self, groups: Sequence[Sequence[QuantizedLayer]]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList([LayerStack(layers) for layers in groups])

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Returns the projections `[S, M, N]` of each group for an embedding `[M, C]`."""
        activated = F.silu(embedding)
        return [stack(activated) for stack in self.stacks]


class Projected(nn.Module):
    """Stands for a layer whose output is computed before the first block.

    Attributes:
        output: The output `[M, N]`, which is set at the beginning of a step.
    """

    output: Tensor

    def forward(self, unused: Tensor) -> Tensor:
        """Returns the output."""
        return self.output


class ConditionedNorm(nn.Module):
    """Computes an `AdaLayerNormZero` whose projection is computed before the first block.

    Args:
        norm: The normalization without weights that the original applies.

    Attributes:
        embedded: The embedding `[M, C]`, which is set at the beginning of a step.
        projected: The projection `[M, 6 C]`, which is set at the beginning of a step.
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
        """Returns five tensors, as `AdaLayerNormZero` does.

        They are the normalized and modulated `x`, the gate of the attention, and the shift, scale and gate of the
        feed-forward layer.
        """
        shift, scale, gate, *rest = self.projected.chunk(_CHUNKS, dim=1)
        return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate, *rest)


def condition_at_once(model: nn.Module) -> None:
    """Makes a deployed model compute the conditioning of all blocks at the beginning of each step, in place.

    The module that computes it becomes the model's `conditioning`. Only DiT and Stable Diffusion 3 are changed. A block
    whose embedder or projection is not computed in integers keeps its own.
    """
    if type(model).__name__ == _EMBEDDED:
        _project_at_once(model)
    else:
        _embed_at_once(model)


def _project_at_once(model: Any) -> None:
    """Computes the projections of a Stable Diffusion 3 when its embedding is known."""
    norms: list[Any] = [module for module in model.modules() if type(module).__name__ in _PROJECTED]
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for norm in norms:
        if getattr(norm, "emb", None) is None and _is_served(norm.linear):
            groups.setdefault(_size(norm.linear), []).append(norm)
    stacked = [group for group in groups.values() if len(group) > 1]
    if not stacked:
        return
    conditioning = Projections([[norm.linear for norm in group] for group in stacked])
    for norm in (norm for group in stacked for norm in group):
        norm.linear = Projected()

    def begin(_: nn.Module, args: tuple[Any, ...], embedding: Tensor) -> None:
        outputs = conditioning.held(conditioning(embedding))
        for group, projections in zip(stacked, outputs, strict=True):
            for norm, output in zip(group, projections, strict=True):
                norm.linear.output = output

    model.conditioning = conditioning
    model.time_text_embed.register_forward_hook(begin)


def _embed_at_once(model: nn.Module) -> None:
    """Computes embeddings and projections of a DiT's blocks when its timesteps and classes are known."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == _NORM and type(getattr(child, "emb", None)).__name__ == _EMBEDDER
    ]
    served = [place for place in places if all(_is_served(layer) for layer in _layers(place[2]))]
    # the first and last layers of a model are often left in float, and with them the embedder of a block
    places = [place for place in served if _sizes(place[2]) == _sizes(served[0][2])]
    if len(places) < 2:
        return
    norms: list[Any] = [child for *_, child in places]
    conditioning = BlockEmbeddings(norms)
    conditioned = [ConditionedNorm(norm.norm) for norm in norms]
    for (parent, name, _), norm in zip(places, conditioned, strict=True):
        setattr(parent, name, norm)
    signature = inspect.signature(model.forward)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = signature.bind(*args, **kwargs).arguments
        embedded, projected = conditioning.held(conditioning(values["timestep"], values["class_labels"]))
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
    """Returns the properties that layers of several norms must have in common to be stacked."""
    return [_size(layer) for layer in _layers(norm)]


def _size(layer: Any) -> tuple[Any, ...]:
    return layer.weight_shape, layer.plan.activation_bits, layer.bias is None
