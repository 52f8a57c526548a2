"""Replaces GroupNorm, SiLU and quantization in the graphs that torch compiles, with what is added before them.

Groups of a UNet have 10 to 80 channels, which lie apart in memory with channels last; Inductor takes three or four
launches for each of them. A kernel between two convolutions ends what Inductor could fuse with them, so that the
convolutions themselves add the time embedding and the residual.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.code_chains import CodeChain, chain_of
from edadm_cli.engines.cuda.graph_nodes import has_numbers, is_call, is_method, replace_node, single_use, value_of

_CONVOLUTION = torch.ops.edadm.conv2d.default
_SAMPLE_BIAS, _RESIDUAL, _NUM_ARGUMENTS = 5, 6, 11  # places of arguments of the operation `conv2d`
_PER_SAMPLE = (slice(None), slice(None), None, None)
_TO_TOKENS = (0, 2, 3, 1)
_CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}


def replace_group_norms(graph: fx.Graph) -> int:
    """Replaces GroupNorms in a graph of Dynamo that become faster, and the additions after convolutions, if there are.

    Returns:
        The number of GroupNorms that were replaced.
    """
    norms = [node for node in graph.find_nodes(op="call_function", target=F.group_norm) if _pays(node)]
    if norms:
        for convolution in graph.find_nodes(op="call_function", target=_CONVOLUTION):
            _fold_addition(convolution)
    return sum(_replace(norm) for norm in norms)


def _pays(norm: fx.Node) -> bool:
    if len(norm.args) != 5:
        return False
    x, weight, bias = (value_of(norm.args[place]) for place in (0, 2, 3))
    if x is None or weight is None or bias is None or x.ndim != 4 or not has_numbers(x):
        return False
    return kernels.group_norm_pays(x, weight, bias)


@dataclass(frozen=True)
class _Ending:
    """What follows a GroupNorm: SiLU or not, an image as rows of tokens or not, and codes.

    Args:
        silu: Whether SiLU follows.
        tokens: The node that makes rows of the image; `None` if a convolution reads the image.
        chain: The nodes of the codes.
        last: The node whose result has the layout of the kernel's codes.
    """

    silu: bool
    tokens: fx.Node | None
    chain: CodeChain
    last: fx.Node


def _ending_of(norm: fx.Node) -> _Ending | None:
    """Returns what follows a GroupNorm; `None` if anything else reads it or a result in between."""
    following, silu, tokens = single_use(norm), False, None
    if is_call(following, F.silu) and not following.kwargs.get("inplace"):
        following, silu = single_use(following), True
    if is_call(following, F.dropout) and following.args[2:3] == (False,):  # a model that is not trained
        following = single_use(following)
    if is_method(following, "permute") and following.args[1:] in (_TO_TOKENS, (_TO_TOKENS,)):
        tokens = single_use(following)
        if not is_method(tokens, "reshape"):
            return None
        following = single_use(tokens)
    chain = chain_of(following, 0) if is_method(following, "float") else None
    if chain is None:
        return None
    last = chain.codes if tokens is not None else single_use(chain.codes)
    if tokens is None and not (is_method(last, "contiguous") and last.kwargs == _CHANNELS_LAST):
        return None
    return None if last is None else _Ending(silu, tokens, chain, last)


def _replace(norm: fx.Node) -> int:
    """Replaces a GroupNorm and all that follows, up to the codes; returns 1 if that is possible, and 0 otherwise."""
    ending = _ending_of(norm)
    if ending is None:
        return 0
    graph, chain = norm.graph, ending.chain
    x, num_groups, weight, bias, eps = norm.args
    quantizer = (chain.inverse_scale, chain.shift, chain.num_bits)
    with graph.inserting_before(ending.last):
        image, more = ([*map(_channels_last, _images(x, num_groups)), None])[:2]
        arguments = (image, weight, bias, num_groups, eps, ending.silu, *quantizer, more)
        codes = graph.call_function(torch.ops.edadm.group_norm_to_codes.default, arguments)
        if ending.tokens is not None:
            codes = graph.call_method("permute", (codes, *_TO_TOKENS))
            codes = graph.call_method("reshape", (codes, *ending.tokens.args[1:]))
    replace_node(ending.last, codes)
    return 1


def _channels_last(image: fx.Node) -> fx.Node:
    """Returns an image with channels-last strides, whatever strides torch gives it when it lowers the graph."""
    return image.graph.call_method("contiguous", (image,), _CHANNELS_LAST)


def _images(x: Any, num_groups: Any) -> list[fx.Node]:
    """Returns the two images whose channels `x` concatenates, if the kernel reads them in place; otherwise `x`."""
    if is_call(x, torch.cat) and (x.args[1:] == (1,) or x.kwargs == {"dim": 1}):
        images: Any = x.args[0]
        values = [value for image in images if (value := value_of(image)) is not None]
        if len(values) == len(images) == 2 and kernels.group_norm_joins(values[0], values[1], num_groups):
            return list(images)
    return [x]


def _fold_addition(convolution: fx.Node) -> None:
    """Makes a convolution add what is added to its result: a number per sample and channel, or an image."""
    addition = single_use(convolution)
    if not is_call(addition, operator.add) or len(convolution.args) != _NUM_ARGUMENTS:
        return
    added = _added(convolution, addition)
    if added is None:
        return
    place, operand = added
    graph, arguments = addition.graph, list(convolution.args)
    with graph.inserting_before(addition):
        arguments[place] = _channels_last(operand) if place == _RESIDUAL else operand
        folded = graph.call_function(_CONVOLUTION, tuple(arguments))
    divided = single_use(addition)
    by_one = is_call(divided, operator.truediv) and divided.args[1:] == (1.0,)
    replace_node(divided if by_one and divided is not None else addition, folded)


def _added(convolution: fx.Node, addition: fx.Node) -> tuple[int, fx.Node] | None:
    """Returns what an addition adds to a convolution's result, and the place of that argument of the operation."""
    other = next((each for each in addition.args if isinstance(each, fx.Node) and each is not convolution), None)
    result, total, added = value_of(convolution), value_of(addition), value_of(other)
    if other is None or result is None or total is None or added is None or not has_numbers(result):
        return None
    if total.stride() != result.stride() or not result.dtype == total.dtype == added.dtype:
        return None
    if added.shape == result.shape and added.stride() == result.stride():
        return (_RESIDUAL, other) if convolution.args[_RESIDUAL] is None else None
    if (
        not is_call(other, operator.getitem)
        or other.args[1] != _PER_SAMPLE
        or convolution.args[_SAMPLE_BIAS] is not None
    ):
        return None
    source = other.args[0]
    bias = value_of(source)
    fits = bias is not None and bias.shape == result.shape[:2] and bias.is_contiguous()
    return (_SAMPLE_BIAS, source) if fits and isinstance(source, fx.Node) else None
