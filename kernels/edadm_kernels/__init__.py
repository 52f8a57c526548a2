"""INT8 and W4A8 kernels for diffusion models, as torch operations of the namespace `edadm`."""

from edadm_kernels.activated import geglu_pays, gelu_pays, linear_geglu_to_codes, linear_gelu_to_codes
from edadm_kernels.added import added_pays, linear_added
from edadm_kernels.attention import (
    attend,
    attend_pays,
    attend_takes,
    attend_to_codes,
    attention_pays,
    attention_quantize,
)
from edadm_kernels.attention_int8 import attend_int8, attend_int8_takes, attend_on_grids
from edadm_kernels.backend import backend, fuses_gelu, uses_kernel
from edadm_kernels.conv import MAX_KERNEL, conv2d
from edadm_kernels.gemm import linear, linear_geglu, linear_gelu, linear_to_codes
from edadm_kernels.heads import join_heads, join_heads_takes
from edadm_kernels.linears import linear_joined, linear_stack, linears, linears_gelu
from edadm_kernels.norm import (
    group_norm,
    group_norm_joins,
    group_norm_pays,
    group_norm_quantize,
    group_norm_to_codes,
    layer_norm_quantize,
    modulated_norm_quantize,
)
from edadm_kernels.pointwise import has_even_rows, quantize, quantize_joined, silu_quantize
from edadm_kernels.product_checks import MAX_TERMS

__all__ = [
    "MAX_KERNEL",
    "MAX_TERMS",
    "added_pays",
    "attend",
    "attend_int8",
    "attend_int8_takes",
    "attend_on_grids",
    "attend_pays",
    "attend_takes",
    "attend_to_codes",
    "attention_pays",
    "attention_quantize",
    "backend",
    "conv2d",
    "fuses_gelu",
    "geglu_pays",
    "gelu_pays",
    "group_norm",
    "group_norm_joins",
    "group_norm_pays",
    "group_norm_quantize",
    "group_norm_to_codes",
    "has_even_rows",
    "join_heads",
    "join_heads_takes",
    "layer_norm_quantize",
    "linear",
    "linear_added",
    "linear_geglu",
    "linear_geglu_to_codes",
    "linear_gelu",
    "linear_gelu_to_codes",
    "linear_joined",
    "linear_stack",
    "linear_to_codes",
    "linears",
    "linears_gelu",
    "modulated_norm_quantize",
    "quantize",
    "quantize_joined",
    "silu_quantize",
    "uses_kernel",
]
