"""The representation of images in a feature space: features and their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Layer = Literal["pooled", "spatial", "logits"]
LAYERS: tuple[Layer, ...] = ("pooled", "spatial", "logits")


@dataclass(frozen=True)
class Features:
    """The features of `N` images: `pooled (N, D)`, `spatial (N, E)`, `logits (N, K)`."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def layer(self, name: Layer) -> Tensor:
        """Returns the features of one layer."""
        return {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}[name]


class Statistics(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)` of features, both float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
