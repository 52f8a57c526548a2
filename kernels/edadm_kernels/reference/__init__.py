"""Every operation in plain torch, exact where the operation is exact: what the kernels are compared with."""

from edadm_kernels.reference.attention import attend_codes, attend_on_grids, attention_codes
from edadm_kernels.reference.heads import join_heads
from edadm_kernels.reference.norms import (
    attention_quantize,
    group_norm_quantize,
    group_norm_to_codes,
    layer_norm_quantize,
    modulated_norm_quantize,
    quantize,
    silu_quantize,
)
from edadm_kernels.reference.products import (
    added,
    conv2d,
    linear,
    linear_added,
    linear_geglu,
    linear_geglu_to_codes,
    linear_gelu,
    linear_gelu_to_codes,
    linear_stack,
    linear_to_codes,
    linears,
)

__all__ = [
    "added",
    "attend_codes",
    "attend_on_grids",
    "attention_codes",
    "attention_quantize",
    "conv2d",
    "group_norm_quantize",
    "group_norm_to_codes",
    "join_heads",
    "layer_norm_quantize",
    "linear",
    "linear_added",
    "linear_geglu",
    "linear_geglu_to_codes",
    "linear_gelu",
    "linear_gelu_to_codes",
    "linear_stack",
    "linear_to_codes",
    "linears",
    "modulated_norm_quantize",
    "quantize",
    "silu_quantize",
]
