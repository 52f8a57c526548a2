"""INT8 and W4A8 kernels for diffusion models, as torch operations of the namespace `edadm`."""

from edadm_kernels.attention import attention_pays, attention_quantize
from edadm_kernels.backend import backend, uses_kernel
from edadm_kernels.conv import MAX_KERNEL, conv2d
from edadm_kernels.gemm import linear, linear_geglu
from edadm_kernels.norm import group_norm, group_norm_quantize, layer_norm_quantize
from edadm_kernels.pointwise import quantize, silu_quantize
from edadm_kernels.product_checks import MAX_TERMS

__all__ = [
    "MAX_KERNEL",
    "MAX_TERMS",
    "attention_pays",
    "attention_quantize",
    "backend",
    "conv2d",
    "group_norm",
    "group_norm_quantize",
    "layer_norm_quantize",
    "linear",
    "linear_geglu",
    "quantize",
    "silu_quantize",
    "uses_kernel",
]
