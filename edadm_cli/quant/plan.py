"""The plan of quantized layers as data, which is part of `quantization_config` and of the artifacts.

Nothing here imports torch before it computes, so that a stage that is up to date can read a plan quickly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edadm_cli.bits import LARGEST_GROUPED_BITS
from edadm_cli.quant.storage import MULTIPLIER_BITS, NIBBLE_BITS, stored_bits

if TYPE_CHECKING:
    from torch import Tensor

    from edadm_cli.quant.grid import Grid

_PART = re.compile(r"\.part\d+$")


def part_name(layer: str, index: int) -> str:
    """Returns the name of one channel part of a split layer."""
    return f"{layer}.part{index}"


def layer_of_part(name: str) -> str:
    """Returns the layer that a part belongs to; the name itself if it is not that of a part."""
    return _PART.sub("", name)


class LayerPlan(BaseModel):
    """The bits of one convolution or linear layer, and the transform of its input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int | None = Field(None, ge=2, le=8, description="null: the input stays in floating point")
    channel_parts: tuple[int, ...] | None = Field(
        None, description="sizes of the channel ranges of a concatenated input that have quantizers of their own"
    )
    group_size: int | None = Field(
        None, ge=8, le=1024, description="weights per group that has a multiplier of its own; null: no groups"
    )
    transform: str | None = Field(None, description="name of the transform of the input; its inverse is in the weight")

    @model_validator(mode="after")
    def _a_transform_belongs_to_codes(self) -> LayerPlan:
        if self.transform is not None and self.activation_bits is None:
            raise ValueError("a layer whose input stays in floating point has no transform")
        return self

    @model_validator(mode="after")
    def _a_group_has_few_bits(self) -> LayerPlan:
        if self.group_size is not None and self.weight_bits > LARGEST_GROUPED_BITS:
            raise ValueError(f"weights of more than {LARGEST_GROUPED_BITS} bits have no groups")
        return self

    @property
    def weight_grid(self) -> Grid:
        """The grid of the weights' codes, before the multipliers of groups."""
        from edadm_cli.quant.grid import weight_grid

        return weight_grid(self.weight_bits)

    @property
    def product_bits(self) -> int:
        """The bits of the integers that are multiplied: those of a code, or 8 where groups have multipliers."""
        return self.weight_bits if self.group_size is None else 8

    @property
    def stored_bits_per_weight(self) -> float:
        """The bits that a weight takes on disk, with its share of the multipliers and without the scales."""
        return stored_bits(self.weight_bits) + (0 if self.group_size is None else MULTIPLIER_BITS / self.group_size)

    @property
    def width(self) -> str:
        """The bits in the notation of `--bits`, such as `w4a8` or `w4g32a8`; `w4` if the input is left in float."""
        groups = "" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.weight_bits}{groups}" + ("" if self.activation_bits is None else f"a{self.activation_bits}")

    @property
    def input_grid(self) -> Grid | None:
        """The grid of the input; `None` if the input is left in float."""
        from edadm_cli.quant.grid import activation_grid

        return None if self.activation_bits is None else activation_grid(self.activation_bits)

    def part(self) -> LayerPlan:
        """Returns the plan of one channel range of this layer."""
        return self.model_copy(update={"channel_parts": None})

    def part_names(self, layer: str) -> list[str]:
        """Returns the names under which a layer's quantizers are stored: its own, or one per channel part."""
        if self.channel_parts is None:
            return [layer]
        return [part_name(layer, index) for index in range(len(self.channel_parts))]

    def split(self, tensor: Tensor, dim: int = 1) -> list[Tensor]:
        """Returns a weight (`dim` 1) or an input, cut into the layer's channel parts."""
        return [tensor] if self.channel_parts is None else list(tensor.split(self.channel_parts, dim=dim))


class AttentionPlan(BaseModel):
    """The bits of the operands of attention's two products, `q k^T` and `p v`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation_bits: int = Field(ge=2, le=8, description="bits of queries, keys and values")
    probability_bits: int = Field(8, ge=2, le=8, description="bits of the probabilities")


class QuantizationPlan(BaseModel):
    """The quantized layers of a denoiser, and the layers left in float, with the reasons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: dict[str, LayerPlan]
    attentions: dict[str, AttentionPlan] = {}
    kept: dict[str, str] = Field(default_factory=dict, description="layer kept in floating point: why")


def format_version(plan: QuantizationPlan) -> int:
    """Returns the version of the tensors' names and packing: the oldest one that stores the plan's codes tightly.

    In format 3 weights may have groups. In format 2 a code of two or three bits takes as many; in format 1, which
    earlier versions of edadm read too, four.
    """
    if any(layer.group_size is not None for layer in plan.layers.values()):
        return 3
    is_tight = any(stored_bits(layer.weight_bits) < NIBBLE_BITS for layer in plan.layers.values())
    return 2 if is_tight else 1


def name_within(place: str, layer: str) -> str:
    """Returns the name of a layer among those of all denoisers of a pipeline.

    Args:
        place: The folder of its denoiser within an artifact, such as `transformer_2`; `""` of the first denoiser.
        layer: Its name within the denoiser.
    """
    return f"{place}.{layer}" if place else layer


def joined(plans: Mapping[str, QuantizationPlan]) -> QuantizationPlan:
    """Returns the plans of several denoisers as one.

    Args:
        plans: The plans by the folder of each denoiser; see `name_within`.
    """
    return QuantizationPlan(
        layers={name_within(at, name): layer for at, plan in plans.items() for name, layer in plan.layers.items()},
        attentions={
            name_within(at, name): each for at, plan in plans.items() for name, each in plan.attentions.items()
        },
        kept={name_within(at, name): reason for at, plan in plans.items() for name, reason in plan.kept.items()},
    )
