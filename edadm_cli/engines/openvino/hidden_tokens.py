"""Leaves out the tokens of a prompt that its mask hides, so that attention does not compute with them.

Pipelines pad a prompt to the longest one that the model takes, such as 300 tokens, of which 20 may be text. Attention
adds a large negative number to the scores of the padding, whose probabilities are then exactly 0, so that the
prediction is the same without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.models.families import family_named

TOKENS_PER_STEP = 64
"""The number of tokens that remain is a multiple of this one, because each number needs a graph of its own."""


def without_hidden_tokens(interface: GraphInterface, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the inputs of a graph without hidden tokens at the end of a prompt.

    Args:
        interface: The interface of the graph. If the graph fits only some calls, nothing is left out.
        tensors: The inputs of a call, by name.
    """
    inputs = dict(tensors)
    return inputs if interface.is_specific else inputs | shortened_prompts(interface.denoiser, inputs)


def shortened_prompts(denoiser: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the masks of a call and the prompts that they belong to, without hidden tokens at the end.

    Args:
        denoiser: The name of the denoiser's class, whose family says which masks hide tokens.
        arguments: The arguments of the call, by name. Other arguments than those masks and prompts are ignored.
    """
    shortened: dict[str, Tensor] = {}
    for mask_name, prompt_name in family_named(denoiser).hiding_masks.items():
        mask, prompt = arguments.get(mask_name), arguments.get(prompt_name)
        if isinstance(mask, Tensor) and isinstance(prompt, Tensor):
            tokens = _tokens(mask, prompt)
            shortened |= {mask_name: mask[:, :tokens], prompt_name: prompt[:, :tokens]}
    return shortened


def _tokens(mask: Tensor, states: Tensor) -> int:
    """Returns how many tokens remain of states `[rows, tokens, channels]`."""
    total = states.shape[1]
    shown = mask == 1
    is_plain = mask.shape == states.shape[:2] and bool((shown | (mask == 0)).all())
    if not is_plain or not bool(shown.any(dim=1).all()):  # attention to hidden tokens alone weighs all alike
        return total
    last = int(shown.any(dim=0).nonzero().max())
    return min(total, (last // TOKENS_PER_STEP + 1) * TOKENS_PER_STEP)
