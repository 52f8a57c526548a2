"""HiDream: blocks with experts, each of which multiplies the tokens that a gate sends to it.

References:
    HiDream-I1, arXiv 2505.22705.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.models.families.family import DenoiserFamily

_MIXTURE = "MOEFeedForwardSwiGLU"
_METHOD = "moe_infer"


def _prepare(denoiser: nn.Module) -> None:
    """Give every expert the tokens of all images in one form: those that the gate sends elsewhere are zeros.

    The number of tokens that reach an expert differs from image to image, and may be none. Experts have no biases, so
    that a token of zeros stays zero, and the sum over the experts is that of the routed tokens alone. A quantizer with
    a zero-point represents zero exactly, so that these tokens neither widen a range nor add an error.
    """
    for module in denoiser.modules():
        if type(module).__name__ == _MIXTURE and _METHOD not in vars(module):
            setattr(module, _METHOD, MethodType(_all_experts, module))


def _all_experts(mixture: Any, tokens: Tensor, flat_indices: Tensor, flat_weights: Tensor) -> Tensor:
    """Return the sum of what the experts compute, weighted by the gate.

    Args:
        mixture: A module with `experts` and `num_activated_experts`.
        tokens: The tokens of all images, with shape `(R * L, C)`.
        flat_indices: The experts of each token, with shape `(R * L * num_activated_experts,)`.
        flat_weights: Their weights, with shape `(R * L * num_activated_experts, 1)`.
    """
    per_token = (-1, mixture.num_activated_experts)
    indices, weights = flat_indices.view(per_token), flat_weights.view(per_token)
    total = torch.zeros_like(tokens)
    for number, expert in enumerate(mixture.experts):
        is_chosen = indices == number
        routed = tokens * is_chosen.any(dim=1, keepdim=True)
        total = total + expert(routed) * (weights * is_chosen).sum(dim=1, keepdim=True)
    return total


HIDREAM = DenoiserFamily(
    name="hidream",
    denoisers=("HiDreamImageTransformer2DModel",),
    block_lists=("double_stream_blocks",),
    rows_second=("encoder_hidden_states_llama3",),
    calls_per_step=1,
    prepare=_prepare,
)
FAMILIES = (HIDREAM,)
