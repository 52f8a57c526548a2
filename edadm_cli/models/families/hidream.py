"""The family of HiDream, whose blocks have experts. Each expert multiplies the tokens that a gate sends to it.

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
    """Makes every expert read all tokens of all images, with zeros in place of those that the gate sends elsewhere.

    Otherwise the number of tokens that reach an expert differs from image to image, and may be zero. Experts have no
    biases, so a token of zeros stays zero, and the sum over the experts is that of the routed tokens alone. A quantizer
    with a zero-point represents zero exactly, so these tokens neither widen a range nor add an error.
    """
    for module in denoiser.modules():
        if type(module).__name__ == _MIXTURE and _METHOD not in vars(module):
            setattr(module, _METHOD, MethodType(_all_experts, module))


def _all_experts(mixture: Any, tokens: Tensor, flat_indices: Tensor, flat_weights: Tensor) -> Tensor:
    """Returns the sum of the experts' outputs, weighted by the gate.

    Args:
        mixture: A module with `experts` and `num_activated_experts`.
        tokens: The tokens of all images, with shape `(R * L, C)`.
        flat_indices: The indices of each token's experts, with shape `(R * L * num_activated_experts,)`.
        flat_weights: The gate's weights of these experts, with shape `(R * L * num_activated_experts, 1)`.
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
