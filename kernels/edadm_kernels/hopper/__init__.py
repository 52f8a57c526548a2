"""Kernels in CUDA C++ for compute capability 9.0, beside the Triton ones: what Triton does not let a kernel say.

Triton waits for every integer matrix instruction in the step that issues it, takes tiles of powers of two, and has no
clusters of blocks. The products, the GroupNorm and the attention here do what those of `conv_kernels`, `gemm_kernels`,
`norm_kernels` and `attention_kernels` do, to the same bits where those are exact; what they do not take stays with
Triton.
"""

from edadm_kernels.hopper.driver import is_available
from edadm_kernels.hopper.variant import Variant

ARCHITECTURE = 90

__all__ = ["ARCHITECTURE", "Variant", "is_available", "variants"]


def variants(arch: int) -> list[Variant]:
    """What the operations may compile for an architecture such as 90; nothing where there is no compiler for it."""
    if arch != ARCHITECTURE or not is_available():
        return []
    # they import what imports this package
    from edadm_kernels.hopper import attention, attention_int8, few_rows, group_norm, matrices, product

    products: list[Variant] = [*product.variants(), *matrices.variants(), *few_rows.variants()]
    return [*products, *group_norm.variants(), *attention.variants(), *attention_int8.variants()]
