"""Kernels in CUDA C++ for compute capability 9.0, which use what Triton does not offer.

Triton waits for every integer matrix instruction in the step that issues it, supports only tiles of powers of two, and
has no clusters of blocks. The products, the GroupNorm and the attention here compute what the kernels of
`conv_kernels`, `gemm_kernels`, `norm_kernels` and `attention_kernels` compute, with the same bits where these are
exact. What they do not support runs in Triton.
"""

from edadm_kernels.hopper.driver import is_available
from edadm_kernels.hopper.variant import Variant

ARCHITECTURE = 90

__all__ = ["ARCHITECTURE", "Variant", "is_available", "variants"]


def variants(arch: int) -> list[Variant]:
    """Lists what the operations may compile for an architecture such as 90; it is empty if there is no compiler."""
    if arch != ARCHITECTURE or not is_available():
        return []
    # these modules import modules that import this package
    from edadm_kernels.hopper import attention_int8, attention_variant, few_rows, group_norm, matrices, product

    products: list[Variant] = [*product.variants(), *matrices.variants(), *few_rows.variants()]
    return [*products, *group_norm.variants(), *attention_variant.variants(), *attention_int8.variants()]
