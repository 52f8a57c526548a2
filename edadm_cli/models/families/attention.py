"""Finds the attention modules of a denoiser and says which of them have products that can be quantized.

These are the modules with one of diffusers' plain attention processors.
"""

from __future__ import annotations

from torch import nn

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
QUANTIZED_PROCESSOR = "QuantizedAttention"


def is_attention(module: nn.Module) -> bool:
    """Returns whether a module computes attention through a processor, as several classes of diffusers do."""
    return hasattr(module, "set_processor") and hasattr(module, "processor")


def products_refusal(module: nn.Module) -> str | None:
    """Returns why the products of an attention module are left in float; `None` if they can be quantized."""
    processor = type(getattr(module, "processor", None)).__name__
    if processor not in PLAIN_PROCESSORS or getattr(module, "norm_q", None) is not None:
        return f"attention products of {processor} are not quantized"
    return None
