r"""Transforms that are applied to a layer's input before it is quantized. Their inverse is folded into the weight.

    y = W x = (W T^-1) (T x):   codes of T x on the input grid, codes of W T^-1 on the weight grid

A transform is an instance of a subclass of `Transform`, and has a name. `register` adds one, and other packages add
theirs by an entry point of the group `edadm.transforms`. A recipe names it in `[[transforms]]`.

References:
    SmoothQuant, arXiv 2211.10438, equation 4 (scales per input channel); DMQ, arXiv 2507.12933 (the same for diffusion,
    learned); DilateQuant, arXiv 2409.14307 (bounded so that no output channel's weight range grows).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from edadm_cli.errors import UsageError
from edadm_cli.plugins import with_plugins

GROUP = "edadm.transforms"
_TINY = 1e-8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ChannelStatistics:
    """Holds statistics of the input channels of a layer over the calibration set.

    Attributes:
        mean_square: E[x_c^2], with shape `(C_in,)`, float32.
        largest: The value that 99.9% of |x_c| do not exceed, with shape `(C_in,)`, float32.
    """

    mean_square: Tensor
    largest: Tensor


class Transform(ABC):
    """An invertible linear map of a layer's input channels.

    Attributes:
        name: The name of the transform in recipes and plans.
        tensors: The names of its tensors, without the layer's name. Each tensor has the shape `(C_in,)` and stays
            float32.
        options: The names of the numbers that a recipe may set, with their defaults.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def calibrate(
        self, weight: Tensor, statistics: ChannelStatistics, options: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Returns the transform's tensors for one layer, by the names in `tensors`.

        Args:
            weight: The full-precision weight, with shape `(C_out, C_in, ...)`.
            statistics: The statistics of the layer's input.
            options: The numbers that the recipe sets, and the defaults of the others.
        """

    @abstractmethod
    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], channel_dim: int) -> Tensor:
        """Returns T x, float32, for an input whose channels are dimension `channel_dim` (1 or -1)."""

    @abstractmethod
    def fold(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns W T^-1 for a weight with shape `(C_out, C_in, ...)`."""

    def mean_square(self, statistics: ChannelStatistics, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns E[(T x)_c^2], computed from E[x_c^2], with shape `(C_in,)`.

        A transform that mixes channels overrides this method.
        """
        ones = statistics.mean_square.sqrt()[None]
        return self.apply(ones, tensors, -1)[0].square()

    def channel_factors(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Returns the factors `(C_in,)` if T x is x times one factor per channel; `None` for any other transform.

        An engine that supports no other transforms runs those that have factors.
        """
        return None


class InputChannelScale(Transform):
    r"""Divides every input channel by a scale s_c, and multiplies the same channel of the weight by s_c.

        s_c = clip((a_c / median(a)) ^ exponent, 1 or less, bound_c),   bound_c = min over o of max_k |W_ok| / |W_oc|

    where a_c is the value that 99.9% of |x_c| do not exceed. Within the bound, no output channel's largest weight
    grows. The weight grid therefore does not change, and the weights of channels with s_c > 1 have a smaller relative
    rounding error.
    """

    name = "input-channel-scale"
    tensors = ("input_channel_scale",)
    options: ClassVar[Mapping[str, float]] = {"exponent": 0.5, "smallest": 1.0, "bounded": 1.0}

    def calibrate(
        self, weight: Tensor, statistics: ChannelStatistics, options: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Returns `input_channel_scale`, with shape `(C_in,)`; see the class for the formula."""
        largest = statistics.largest.float().clamp_min(_TINY)
        scale = (largest / largest.median()).pow(options["exponent"]).clamp_min(options["smallest"])
        if options["bounded"]:
            scale = torch.minimum(scale, dilation_bound(weight.float()).to(scale.device))
        return {"input_channel_scale": scale}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], channel_dim: int) -> Tensor:
        """Returns x / s, computed as x times the float32 reciprocal of s, as in every engine."""
        factors = self.channel_factors(tensors)
        return x.float() * (factors if channel_dim == -1 else factors.reshape(-1, *[1] * (x.dim() - 2)))

    def fold(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight with its input channels multiplied by s."""
        scale = tensors["input_channel_scale"].to(weight.device)
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 2))

    def channel_factors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns 1 / s, with shape `(C_in,)`, float32."""
        return tensors["input_channel_scale"].reciprocal()


def dilation_bound(weight: Tensor) -> Tensor:
    """Returns the largest scale per input channel that changes no output channel's range, with shape `(C_in,)`.

    bound_c = min over o of (max over k of |W_ok|) / |W_oc|, at least 1

    Args:
        weight: A weight with shape `(C_out, C_in, ...)`. Of a convolution kernel, the largest element counts.

    References:
        DilateQuant, arXiv 2409.14307, section 4 (weight dilation).
    """
    magnitudes = weight.abs().flatten(2).amax(dim=2) if weight.dim() > 2 else weight.abs()  # [C_out, C_in]
    return (magnitudes.amax(dim=1, keepdim=True).clamp_min(_TINY) / magnitudes.clamp_min(_TINY)).amin(dim=0)


class HadamardRotation(Transform):
    r"""Rotates groups of input channels by a regular Hadamard matrix, which spreads outliers over their group.

        T = diag(H, ..., H),  H_4g = H_4 (x) H_g,  2 H_4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

    H is symmetric and its own inverse. In contrast to Sylvester's Hadamard matrix, H has no constant row, so the mean
    of a group is not concentrated in one channel. If the group size does not divide the number of channels, the largest
    smaller power of 4 that divides it is used. This may be 1, which means no rotation.

    References:
        QuaRot, arXiv 2404.00456 (Hadamard rotations); ConvRot, arXiv 2512.03673 (regular Hadamard rotations by groups).
    """

    tensors = ()
    group: ClassVar[int]

    def calibrate(
        self, weight: Tensor, statistics: ChannelStatistics, options: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Returns no tensors, because the matrix depends only on the number of channels."""
        return {}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], channel_dim: int) -> Tensor:
        """Returns T x, which is H times each group of channels, float32, in the shape of `x`."""
        last = x.float() if channel_dim == -1 else x.float().movedim(channel_dim, -1)
        rotated = self._rotated(last)
        return rotated if channel_dim == -1 else rotated.movedim(-1, channel_dim)

    def fold(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns W T^-1, which is each group of input channels times H, since H^-1 = H."""
        return self._rotated(weight.movedim(1, -1)).movedim(-1, 1).contiguous()

    def mean_square(self, statistics: ChannelStatistics, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean of E[x_c^2] over each group, which is exact for uncorrelated channels, `(C_in,)`."""
        energy = statistics.mean_square
        size = self.size(energy.shape[0])
        return energy.view(-1, size).mean(dim=1).repeat_interleave(size)

    def size(self, channels: int) -> int:
        """Returns the number of channels that are rotated together in a layer with `channels` channels."""
        size = self.group
        while channels % size:
            size //= 4
        return size

    def _rotated(self, x: Tensor) -> Tensor:
        size = self.size(x.shape[-1])
        return (x.unflatten(-1, (-1, size)) @ regular_hadamard(size, x.device)).flatten(-2)


class Hadamard16(HadamardRotation):
    """A rotation of groups of 16 channels."""

    name, group = "hadamard-16", 16


class Hadamard64(HadamardRotation):
    """A rotation of groups of 64 channels."""

    name, group = "hadamard-64", 64


class Hadamard256(HadamardRotation):
    """A rotation of groups of 256 channels."""

    name, group = "hadamard-256", 256


def regular_hadamard(size: int, device: torch.device = _CPU) -> Tensor:
    """Returns the orthogonal regular Hadamard matrix `(size, size)` in float32; `size` is a power of 4.

    In a compiled graph the matrix is a constant, which is computed once.
    """
    return _regular_hadamard(size, device)


regular_hadamard._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


@cache
def _regular_hadamard(size: int, device: torch.device) -> Tensor:
    rows = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    four = torch.tensor(rows, dtype=torch.float32, device=device)
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


_SHIPPED = (InputChannelScale(), Hadamard16(), Hadamard64(), Hadamard256())
_registered: dict[str, Transform] = {}


def register(transform: Transform) -> None:
    """Registers a transform under its name, where it replaces any other transform of that name."""
    _registered[transform.name] = transform


def transforms() -> dict[str, Transform]:
    """Returns all transforms by name: those of this package, of other packages, and those that `register` added.

    Raises:
        MachineError: Another package's transform cannot be loaded, or its name is in use already.
    """
    return {**_installed(), **_registered}


def transform_named(name: str) -> Transform:
    """Returns the transform of a name.

    Raises:
        UsageError: There is no transform with this name.
    """
    known = transforms()
    if name not in known:
        raise UsageError(
            f"There is no transform '{name}'; known are {', '.join(sorted(known))}.",
            hint=f"install the package that brings it, by an entry point of the group {GROUP}",
        )
    return known[name]


@cache
def _installed() -> dict[str, Transform]:
    return with_plugins(_SHIPPED, GROUP, Transform)
