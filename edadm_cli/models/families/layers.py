"""Says what kind of building block a module of diffusers is, by which the cost of a call is reported."""

from __future__ import annotations

from torch import nn

from edadm_cli.models.stored import is_stored

ATTENTION = "Attention"
FEED_FORWARD = "FeedForward"
GATED_FEED_FORWARD = "GEGLU"
_NORMS = ("RMSNorm", "GlobalResponseNorm")
_STACKED = "Experts"


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module normalizes its input."""
    return isinstance(module, nn.GroupNorm | nn.LayerNorm) or type(module).__name__ in _NORMS


def is_weighted(module: nn.Module) -> bool:
    """Returns whether a module multiplies its input by a weight matrix or kernel that it holds, whatever its type."""
    if is_stored(module) or _holds_experts(module):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and not isinstance(module, nn.Embedding)


def _holds_experts(module: nn.Module) -> bool:
    """Returns whether a module holds the matrices of several experts in one parameter, as `SwiGLUExperts` does."""
    is_named_so = type(module).__name__.endswith(_STACKED)
    return is_named_so and any(
        parameter is not None and parameter.ndim == 3 for parameter in module._parameters.values()
    )
