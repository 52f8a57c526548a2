"""The numbers of the optimization, after the recipe's open choices were filled in from the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edadm_cli.config import BitWidth
from edadm_cli.models.registry import PaperSettings
from edadm_cli.recipe import ChannelValue, LearnRecipe

# Defaults for a model without published settings: batch, iterations and gamma are those of the paper. Over a cosine
# Adam moves an alpha by at most half the step times the iterations, so 1,000 iterations need a larger step than the
# published 1e-2 to 5e-2 of 5,000; scales learn as slowly as those of the paper's larger systems.
_FALLBACK = PaperSettings(
    iterations=1000,
    batch_size=32,
    layer_loss_weight=0.8,
    learning_rates={"w4a8": (1e-1, 1e-4), "w8a8": (5e-2, 1e-4)},
)
_LOW_BITS = 6  # below this, weights learn at the published four-bit rate, else at the eight-bit rate


class Hyperparameters(BaseModel):
    """The numbers of one unit's optimization, all of them decided; the fields are those of `LearnRecipe`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iterations: int
    batch_size: int
    layer_loss_weight: float
    relative_layer_losses: bool
    weight_learning_rate: float
    activation_learning_rate: float
    relative_scale_steps: bool
    input_drop: float
    activation_drop: float
    rounding_regularizer: float
    rounding_sharpness: float = 1.0
    rounding_sharpness_start: float = 0.3
    mixed_inputs: Literal["all", "hidden"] = "all"
    rounding_first: float = 0.0
    rate_decay: Literal["cosine", "constant"] = "cosine"
    channel_values: tuple[ChannelValue, ...] = ()
    channel_learning_rate: float = 1e-3
    network_iterations: int = 0
    network_samples: int = 4096
    network_batch_size: int = 32
    network_learning_rate: float = 3e-3
    network_step_weights: Literal["alike", "effect"] = "alike"

    def identity_fields(self) -> dict[str, Any]:
        """Returns the fields that decide the result; those with a default count only if they differ from it."""
        return self.model_dump(mode="json", exclude_defaults=True)


def resolve(recipe: LearnRecipe, published: PaperSettings | None, bits: BitWidth) -> Hyperparameters:
    """Fills the recipe's open fields from the model's published settings."""
    settings = published or _FALLBACK
    rates = settings.learning_rates["w4a8" if bits.weight < _LOW_BITS else "w8a8"]
    defaults = {
        "iterations": settings.iterations,
        "batch_size": settings.batch_size,
        "layer_loss_weight": settings.layer_loss_weight,
        "weight_learning_rate": rates[0],
        "activation_learning_rate": rates[1],
    }
    given = {name: value for name, value in recipe.model_dump(exclude={"granularity"}).items() if value is not None}
    return Hyperparameters(**{**defaults, **given})
