"""Replaces GroupNorm, SiLU and quantization in the graphs that torch compiles, with what is added before them.

Groups of a UNet have 10 to 80 channels, which lie apart in memory with channels last; Inductor takes three or four
launches for each of them. A kernel between two convolutions ends what Inductor could fuse with them, so that the
convolutions themselves add the time embedding and the residual.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.graph_passes.code_chains import CodeChain, chain_of
from edadm_cli.engines.cuda.graph_passes.graph_nodes import (
    has_numbers,
    is_call,
    is_method,
    replace_node,
    single_use,
    value_of,
)

_CONVOLUTION = torch.ops.edadm.conv2d.default
_SAMPLE_BIAS, _RESIDUAL, _NUM_ARGUMENTS = 5, 6, 11  # places of arguments of the operation `conv2d`
_PER_SAMPLE = (slice(None), slice(None), None, None)
_TO_TOKENS = (0, 2, 3, 1)


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
    tensors = [value_of(norm.args[0]), *(value_of(node) for node in norm.args[2:4])]
    if len(norm.args) != 5 or len(tensors) != 3 or any(x is None for x in tensors):
        return False
    x, weight, bias = tensors
    assert x is not None
    assert weight is not None
    assert bias is not None
    return x.ndim == 4 and has_numbers(x) and kernels.group_norm_pays(x, weight, bias)


def _replace(norm: fx.Node) -> int:
    """Replaces a GroupNorm and all that follows, up to the codes; returns whether that was possible."""
    following, silu = single_use(norm), False
    if is_call(following, F.silu) and not following.kwargs.get("inplace"):
        following, silu = single_use(following), True
    if is_call(following, F.dropout) and following.args[2:3] == (False,):
        following = single_use(following)
    tokens = None
    if following is not None and is_method(following, "permute") and following.args[1:] in (_TO_TOKENS, (_TO_TOKENS,)):
        tokens = single_use(following)
        if tokens is None or not is_method(tokens, "reshape"):
            return 0
        following = single_use(tokens)
    chain = None if following is None or not is_method(following, "float") else chain_of(following, 0)
    last = None if chain is None else _last(chain, tokens)
    if chain is None or last is None:
        return 0
    graph = norm.graph
    x, num_groups, weight, bias, eps = norm.args
    quantizer = (chain.inverse_scale, chain.shift, chain.num_bits)
    with graph.inserting_before(last):
        image, more = ([*map(_channels_last, _images(x, num_groups)), None])[:2]
        codes = graph.call_function(
            torch.ops.edadm.group_norm_to_codes.default,
            (image, weight, bias, num_groups, eps, silu, *quantizer, more),
        )
        if tokens is not None:
            codes = graph.call_method("permute", (codes, *_TO_TOKENS))
            codes = graph.call_method("reshape", (codes, *tokens.args[1:]))
    replace_node(last, codes)
    return 1


def _last(chain: CodeChain, tokens: fx.Node | None) -> fx.Node | None:
    """Returns the node whose result has the layout of the kernel's codes."""
    if tokens is not None:
        return chain.codes
    node = single_use(chain.codes)
    is_last = node is not None and is_method(node, "contiguous")
    return node if is_last and node.kwargs.get("memory_format") is torch.channels_last else None  # type: ignore[union-attr]


def _channels_last(image: fx.Node) -> fx.Node:
    """Returns an image with channels-last strides, whatever strides torch gives it when it lowers the graph."""
    return image.graph.call_method("contiguous", (image,), {"memory_format": torch.channels_last})


def _images(x: Any, num_groups: Any) -> list[fx.Node]:
    """Returns the two images whose channels `x` concatenates, if the kernel reads them in place; otherwise `x`."""
    images: Any = x.args[0] if is_call(x, torch.cat) and (x.args[1:] == (1,) or x.kwargs == {"dim": 1}) else ()
    if len(images) == 2:
        first, second = map(value_of, images)
        if first is not None and second is not None and kernels.group_norm_joins(first, second, num_groups):
            return list(images)
    return [x]


def _fold_addition(convolution: fx.Node) -> None:
    """Makes a convolution add what is added to its result: a number per sample and channel, or an image."""
    addition = single_use(convolution)
    if not is_call(addition, operator.add) or len(convolution.args) != _NUM_ARGUMENTS:
        return
    (other,) = [each for each in addition.args if each is not convolution] or [None]
    result, total = value_of(convolution), value_of(addition)
    if not isinstance(other, fx.Node) or result is None or total is None or not has_numbers(result):
        return
    place, arguments = _place_of(other, result), list(convolution.args)
    is_same_form = total.dtype == result.dtype and total.stride() == result.stride()
    if place is None or arguments[place] is not None or not is_same_form:
        return
    with addition.graph.inserting_before(addition):
        arguments[place] = other.args[0] if place == _SAMPLE_BIAS else _channels_last(other)
        folded = addition.graph.call_function(_CONVOLUTION, tuple(arguments))
    divided = single_use(addition)
    by_one = is_call(divided, operator.truediv) and divided.args[1:] == (1.0,)
    replace_node(divided if by_one and divided is not None else addition, folded)


def _place_of(other: fx.Node, result: Tensor) -> int | None:
    """Returns which argument of a convolution adds a node to its result; `None` if none does."""
    added = value_of(other)
    if added is None or added.dtype != result.dtype:
        return None
    if added.shape == result.shape and added.stride() == result.stride():
        return _RESIDUAL
    if is_call(other, operator.getitem) and other.args[1] == _PER_SAMPLE:
        bias = value_of(other.args[0])
        if bias is not None and bias.shape == result.shape[:2] and bias.is_contiguous():
            return _SAMPLE_BIAS
    return None
