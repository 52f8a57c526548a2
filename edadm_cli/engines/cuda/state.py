"""Holds what the layers of one denoiser share within a step, and between the steps of one prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.products.product import IntegerLinear, merge

Pair = tuple[Tensor, Tensor]


class TimeProjections:
    r"""Computes all residual blocks' projections of SiLU(time embedding) in one GEMM per step.

    The layers share their input but may have different quantizers. The codes of all U quantizers are stacked,
    `[U * batch, K]`, and multiplied by all weights at once. Each layer's columns are then read from the rows of
    its quantizer. The sums equal those of separate products, and one tile holds all these rows because they are few.
    """

    def __init__(self) -> None:
        self._layers: list[IntegerLinear] = []
        self._sizes: list[int] = []
        self._index: dict[int, Tensor] = {}
        self._embedding: Tensor | None = None
        self._biases: list[Tensor] = []

    def add(self, layer: IntegerLinear) -> int:
        """Adds a layer, and returns the place of its result."""
        self._layers.append(layer)
        self._sizes.append(layer.num_outputs)
        return len(self._layers) - 1

    def freeze(self) -> None:
        """Merges the layers that were added."""
        if not self._layers:
            return
        quantizers = {layer.quantizer.key: layer.quantizer for layer in self._layers}
        places = {key: index for index, key in enumerate(quantizers)}
        self._of_layer = [places[layer.quantizer.key] for layer in self._layers]
        self._quantizers = list(quantizers.values())
        column = torch.Size((-1, 1, 1))
        self._inverse_scales = torch.cat([q.scale for q in self._quantizers]).reciprocal().view(column)
        self._zero_points = torch.cat([q.zero_point for q in self._quantizers]).view(column)
        limits = [float((1 << q.num_bits) - 1) for q in self._quantizers]
        self._limits = torch.tensor(limits, device=self._zero_points.device).view(column)
        self._merged = merge(self._layers)
        self._layers = []

    def begin(self) -> None:
        """Forgets the last step's results."""
        self._embedding, self._biases = None, []

    def bias(self, place: int, embedding: Tensor) -> Tensor:
        """Returns a layer's product with SiLU(`embedding`), `[N, C_out]`, contiguous."""
        if self._embedding is not embedding:
            self._biases, self._embedding = self._compute(embedding), embedding
        return self._biases[place]

    def _compute(self, embedding: Tensor) -> list[Tensor]:
        batch = embedding.shape[0]
        y = self._merged.product(self._codes(embedding))  # [U * N, sum of C_out]
        flat = y.view(-1)[self._places(batch)]
        pieces = flat.split([batch * size for size in self._sizes])
        return [piece.view(batch, size) for piece, size in zip(pieces, self._sizes, strict=True)]

    def _codes(self, embedding: Tensor) -> Tensor:
        if len(self._quantizers) == 1:
            only = self._quantizers[0]
            return kernels.silu_quantize(embedding, only.scale, only.zero_point, only.num_bits)
        activated = F.silu(embedding.float())
        codes = torch.round(activated * self._inverse_scales) + self._zero_points
        codes = torch.minimum(codes.clamp_(min=0), self._limits).sub_(128).to(torch.int8)
        return codes.view(-1, embedding.shape[1])

    def _places(self, batch: int) -> Tensor:
        """Returns where the results of each layer stand in the flattened output, layer after layer."""
        if batch not in self._index:
            width, start, places = sum(self._sizes), 0, []
            for size, quantizer in zip(self._sizes, self._of_layer, strict=True):
                rows = torch.arange(batch)[:, None] + quantizer * batch
                places.append((rows * width + start + torch.arange(size)).flatten())
                start += size
            self._index[batch] = torch.cat(places).to(self._merged.weight.device)
        return self._index[batch]


class PromptCache:
    """Computes keys and values of cross-attention once per prompt.

    They are stored in buffers with a fixed address per shape of the prompt's states, from which a recorded step reads
    the keys and values of the last prompt.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._projections: list[Callable[[Tensor], Pair]] = []
        self._buffers: dict[torch.Size, list[Pair]] = {}
        self._prompt: Tensor | None = None
        self._version = -1
        self._pairs: list[Pair] = []

    def add(self, project: Callable[[Tensor], Pair]) -> int:
        """Adds a function of the prompt's states, and returns the place of its result."""
        self._projections.append(project)
        return len(self._projections) - 1

    @property
    def is_used(self) -> bool:
        """Returns whether the cache is active and has functions to compute."""
        return self.is_active and bool(self._projections)

    def hold(self, prompt: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        """Computes the keys and values of `prompt`, unless it is the unchanged tensor of the last call.

        Args:
            prompt: The text states `[N, T, C]`.
            place: A function that moves them to the device and element type of the layers.
        """
        version = -1 if prompt.is_inference() else prompt._version
        if prompt is self._prompt and version == self._version and version >= 0:
            return
        states = place(prompt)
        pairs = [project(states) for project in self._projections]
        key = prompt.shape
        if key in self._buffers:
            for stored, new in zip(self._buffers[key], pairs, strict=True):
                stored[0].copy_(new[0])
                stored[1].copy_(new[1])
        else:
            self._buffers[key] = [(k.clone(), v.clone()) for k, v in pairs]
        self._prompt, self._version, self._pairs = prompt, version, self._buffers[key]

    def forget(self) -> None:
        """Makes the next prompt be computed even if it is that of the last call, because layers have changed."""
        self._prompt = None

    def pair(self, place: int) -> Pair:
        """Returns the key and value of the prompt that is held."""
        return self._pairs[place]


class StepState:
    """Holds what the blocks of one denoiser share."""

    def __init__(self) -> None:
        self.time = TimeProjections()
        self.prompt = PromptCache()

    def begin(self) -> None:
        """Prepares for a call of the denoiser."""
        self.time.begin()
