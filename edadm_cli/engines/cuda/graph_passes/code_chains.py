"""Finds the nodes of a graph of Dynamo that turn a result into the codes of the layers behind it.

`layer_product` writes them as plain operations, so that Inductor fuses them into what comes before. Attention and some
normalizations are kernels of their own, which can write these codes themselves.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from edadm_cli.engines.cuda.graph_passes.graph_nodes import dtype_of, is_call, is_method, shape_of, single_use
from edadm_kernels.pack import CODE_OFFSET


@dataclass(frozen=True)
class CodeChain:
    """The nodes that compute the codes of a tensor, or of the tokens from `start` to `stop`.

    Args:
        start: The first token.
        stop: The token after the last one.
        inverse_scale: The node of the reciprocal of the scale.
        shift: The node of the zero-point of signed codes.
        num_bits: Bits of a code.
        codes: The node of the codes, int8.
    """

    start: int
    stop: int
    inverse_scale: fx.Node
    shift: fx.Node
    num_bits: int
    codes: fx.Node


def code_chains(attention: fx.Node) -> list[CodeChain]:
    """Returns the chains of an attention's result whose tokens are all of its tokens, in order.

    The list is empty if anything else reads the result, or if it has more than two chains.

    Args:
        attention: The node of the result, `[N, heads, T, d]`.
    """
    node = single_use(attention)
    if node is None or not is_method(node, "transpose") or node.args[1:] != (1, 2):
        return []
    node = single_use(node)
    shape = None if node is None else shape_of(node)
    heads = shape_of(attention)
    if node is None or shape is None or heads is None or not (is_method(node, "flatten") or is_method(node, "reshape")):
        return []
    if tuple(shape) != (heads[0], heads[2], heads[1] * heads[3]):
        return []
    after = single_use(node)
    if after is not None and is_method(after, "to") and dtype_of(after) == dtype_of(node):
        node = after
    chains = [chain_of(user, shape[1]) for user in node.users]
    ordered = sorted((chain for chain in chains if chain is not None), key=lambda chain: chain.start)
    edges = [0, *(chain.stop for chain in ordered)]
    starts = [chain.start for chain in ordered]
    complete = len(ordered) == len(chains) <= 2 and edges[-1] == shape[1] and starts == edges[:-1]
    return ordered if complete else []


def chain_of(node: fx.Node, tokens: int) -> CodeChain | None:
    """Returns the chain that begins with a use of a tensor that has `tokens` tokens."""
    start, stop = 0, tokens
    if is_call(node, operator.getitem):
        chosen, following = _chosen_tokens(node.args[1], tokens), single_use(node)
        if chosen is None or following is None:
            return None
        start, stop, node = *chosen, following
    if not is_method(node, "float"):
        return None
    scaled = _binary(node, operator.mul)
    rounded = None if scaled is None else single_use(scaled[0])
    if scaled is None or rounded is None or rounded.target is not torch.round:
        return None
    shifted = _binary(rounded, operator.add)
    clamped = None if shifted is None else single_use(shifted[0])
    codes = None if clamped is None else single_use(clamped)
    if shifted is None or clamped is None or codes is None or not is_method(clamped, "clamp"):
        return None
    bounds = clamped.args[1:]
    if len(bounds) != 2 or bounds[0] != -CODE_OFFSET or not isinstance(bounds[1], int):
        return None
    if not is_method(codes, "to") or codes.args[1:] != (torch.int8,):
        return None
    num_bits = (bounds[1] + CODE_OFFSET).bit_length()
    return CodeChain(start, stop, scaled[1], shifted[1], num_bits, codes)


def _chosen_tokens(index: object, tokens: int) -> tuple[int, int] | None:
    """Returns the first token of an index `[:, start:stop]` and the one after the last; `None` for other indices."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return None
    try:
        start, stop, step = index[1].indices(tokens)
    except TypeError:  # a bound is a node
        return None
    return (start, stop) if step == 1 else None


def _binary(node: fx.Node, function: object) -> tuple[fx.Node, fx.Node] | None:
    """Returns the single use of a node by a function of two nodes, and the other node."""
    use = single_use(node)
    if use is None or use.target is not function or len(use.args) != 2:
        return None
    other = use.args[1]
    if use.args[0] is not node or not isinstance(other, fx.Node) or other.op != "placeholder":
        return None  # a placeholder exists before the attention
    return use, other
