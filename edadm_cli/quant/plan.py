"""What a quantized layer is made of, as data: it travels in `quantization_config` and in the artifacts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.quant.grid import Grid, activation_grid, weight_grid


class LayerPlan(BaseModel):
    """Bits of one convolution or linear layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int | None = Field(None, ge=2, le=8, description="null: the input stays in floating point")
    channel_parts: tuple[int, ...] | None = Field(
        None, description="sizes of the channel ranges of a concatenated input that have quantizers of their own"
    )

    @property
    def weight_grid(self) -> Grid:
        """The codes of the weights."""
        return weight_grid(self.weight_bits)

    @property
    def input_grid(self) -> Grid | None:
        """The codes of the input; `None` when it stays in floating point."""
        return None if self.activation_bits is None else activation_grid(self.activation_bits)

    def part(self) -> LayerPlan:
        """The plan of one channel range of this layer."""
        return self.model_copy(update={"channel_parts": None})


class AttentionPlan(BaseModel):
    """Bits of attention's two products: queries, keys, values, and the probabilities."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation_bits: int = Field(ge=2, le=8)
    probability_bits: int = Field(8, ge=2, le=8)


class QuantizationPlan(BaseModel):
    """Every layer of a denoiser that is quantized, and every one that is not, with the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: dict[str, LayerPlan]
    attentions: dict[str, AttentionPlan] = {}
    kept: dict[str, str] = Field(default_factory=dict, description="layer kept in floating point: why")
