"""The result of `sensitivity`, which `reconstruct` reads to spend a budget of bits, and the report shows."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edadm_cli.artifacts.payloads import Payload
from edadm_cli.bits import LARGEST_GROUP, SMALLEST_GROUP

Width = Annotated[int, Field(ge=2, le=8)]
Error = Annotated[float, Field(ge=0)]


class LayerSensitivity(BaseModel):
    """The rise of the final error when one layer alone is quantized.

    An error is a squared error of the final sample relative to its energy: the square of a relative L2 distance. It is
    computed to first order, with every other layer at full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    unit: str = Field(description="the unit that the layer is reconstructed with")
    num_weights: Annotated[int, Field(ge=1)]
    weight_errors: dict[Width, Error] = Field(description="bits of the weights, the input in float -> error")
    group_errors: dict[Width, Error] = Field(
        {},
        description="bits of the weights in groups, the input in float -> error; empty where no groups were measured",
    )
    final_ratio: Error | None = Field(None, description="of earlier versions: a factor that errors of weights contain")
    learning_factor: Error | None = Field(
        None, description="how learning or GPTQ changes the errors of weights, which contain it; null: nearest rounding"
    )
    activation_errors: dict[Width, Error] = Field(
        description="bits of the input, the weights in float -> error; empty where the input stays in float"
    )


class Sensitivity(Payload):
    """`sensitivity.json`: every layer at every measured number of bits."""

    FILE: ClassVar[str] = "sensitivity.json"

    layers: tuple[LayerSensitivity, ...] = Field(min_length=1)
    step_gains: tuple[Error, ...] = Field(
        description="squared error of the final sample per squared error of the prediction at each step of the first "
        "denoiser, then at those of each further one"
    )
    num_samples: Annotated[int, Field(ge=1)]
    group_size: int | None = Field(
        None, ge=SMALLEST_GROUP, le=LARGEST_GROUP, description="weights per group of group_errors"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise ValueError("a layer is listed twice")
        if not all(layer.weight_errors for layer in self.layers):
            raise ValueError("a layer has no weight_errors")
        return self

    def ranked(self, bits: int) -> list[LayerSensitivity]:
        """Returns the layers that were measured with weights of `bits` bits, the most sensitive first."""
        measured = [layer for layer in self.layers if bits in layer.weight_errors]
        return sorted(measured, key=lambda layer: -layer.weight_errors[bits])
