"""Products of layers with LoRA adapters. The product's epilogue adds the output of the side branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edadm_cli.engines.adapters import SideBranch, side_by_side
from edadm_cli.engines.cuda.products.layout import channels_last, image_of, rows_of
from edadm_cli.engines.cuda.products.product import IntegerLinear, Product, merge


class AdaptedProduct(Product):
    """A product that takes its input in floating point, because its side branch reads the input too.

    Args:
        base: The product without adapters.
        branch: The side branch of the adapters.
    """

    def __init__(self, base: Product, branch: SideBranch) -> None:
        super().__init__()
        self.base, self.branch, self.label = base, branch, base.label

    @property
    def num_outputs(self) -> int:
        """Returns the number of output features."""
        return self.branch.up.shape[0]

    def prepare(self, x: Tensor) -> Tensor:
        """Returns `x` itself."""
        return channels_last(x) if x.ndim == 4 else x

    def product(self, prepared: Tensor, residual: Tensor | None = None, sample_bias: Tensor | None = None) -> Tensor:
        """Multiplies, and adds the side branch and `residual` in the epilogue; see `Product`."""
        added = self._branch(prepared, residual)
        return self.base.product(self.base.prepare(prepared), added, sample_bias)

    def _branch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        is_pointwise = self.branch.is_convolution and self.branch.down.shape[2:].numel() == 1
        if not is_pointwise or self.branch.stride != (1, 1):
            return self.branch(x, residual)
        # a 1x1 convolution as a matrix product over the rows of the image
        rows = None if residual is None else rows_of(channels_last(residual))
        down = self.branch.down.flatten(1)
        added = self.branch.raise_to(rows_of(channels_last(x)).to(down.dtype) @ down.T, rows)
        return image_of(added, x.shape[0], *x.shape[2:])


def base_of(layer: Product) -> Product:
    """Returns the product of a layer without its adapters."""
    return layer.base if isinstance(layer, AdaptedProduct) else layer


def merge_adapted(layers: Sequence[Product]) -> AdaptedProduct:
    """Returns one product for integer linear layers that share an input and a quantizer, some with adapters."""
    bases = [base for base in map(base_of, layers) if isinstance(base, IntegerLinear)]
    branches = [layer.branch if isinstance(layer, AdaptedProduct) else None for layer in layers]
    return AdaptedProduct(merge(bases), side_by_side(branches, [base.num_outputs for base in bases]))
