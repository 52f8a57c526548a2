"""Makes products add their results to a residual in the graphs that torch compiles, scaled by a gate per sample if any.

Inductor fuses such a sum with the normalization behind it. From four million elements on, that normalization is a
kernel of its own, and the sum would be another one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.graph_passes.graph_nodes import (
    has_numbers,
    is_call,
    is_method,
    operands_of,
    pays_for,
    replace_node,
    single_use,
    value_of,
)

_PRODUCTS = (torch.ops.edadm.linear.default, torch.ops.edadm.linear_joined.default)
_FIRST = (slice(None), 0)


def replace_additions(graph: fx.Graph) -> int:
    """Replaces those products in a graph of Dynamo whose sum with a residual becomes faster; returns their number."""
    products = [node for target in _PRODUCTS for node in graph.find_nodes(op="call_function", target=target)]
    return sum(map(_replace, products))


def _replace(product: fx.Node) -> int:
    node, operands = single_use(product), operands_of(product)
    if node is None or not is_method(node, "view") or operands is None:
        return 0
    node = _behind_nothing(node)
    gate, following = None, single_use(node)
    if is_call(following, operator.mul):
        gate = _other(following, node)
        node, following = following, single_use(following)
    result = value_of(product)
    if not is_call(following, operator.add) or result is None:
        return 0
    residual = _other(following, node)
    if not _is_like(residual, following, result) or not (gate is None or _is_gate(gate, following)):
        return 0
    graph, shape = product.graph, value_of(following).shape  # type: ignore[union-attr]
    with graph.inserting_before(following):
        rows = graph.call_method("reshape", (residual, -1, shape[-1]))
        rows.meta["example_value"] = value_of(residual).reshape(-1, shape[-1])  # type: ignore[union-attr]
        factor = None if gate is None else graph.call_function(operator.getitem, (gate, _FIRST))
        if factor is not None:
            factor.meta["example_value"] = value_of(gate)[:, 0]  # type: ignore[index]
        arguments = (*operands[:5], rows, factor, *operands[5:])
        pays = pays_for(kernels.added_pays, arguments)
        if pays:
            added = graph.call_function(torch.ops.edadm.linear_added.default, arguments)
            added = graph.call_method("view", (added, *shape))
    if not pays:
        for unused in (factor, rows):
            if unused is not None:
                graph.erase_node(unused)
        return 0
    replace_node(following, added)
    return 1


def _behind_nothing(node: fx.Node) -> fx.Node:
    """Returns the last of the nodes behind a node that leave its result as it is: dropout, and a division by one."""
    following = single_use(node)
    while following is not None and following.args[:1] == (node,):
        is_dropout = is_call(following, F.dropout) and following.args[2:3] == (False,)
        if not is_dropout and not (is_call(following, operator.truediv) and following.args[1:] == (1.0,)):
            break
        node, following = following, single_use(following)
    return node


def _other(node: fx.Node, operand: fx.Node) -> Any:
    """Returns the other operand of a function of two."""
    others = [each for each in node.args if each is not operand]
    return others[0] if len(others) == 1 else None


def _is_like(residual: Any, total: fx.Node, product: Tensor) -> bool:
    """Returns whether a node is a contiguous tensor `[N, T, C]` of the shape and type of the sum."""
    values = value_of(residual), value_of(total)
    if values[0] is None or values[1] is None or not has_numbers(values[0]) or not has_numbers(values[1]):
        return False
    is_alike = values[0].shape == values[1].shape and values[0].dtype == values[1].dtype == product.dtype
    return is_alike and values[0].is_contiguous() and values[0].ndim == 3


def _is_gate(gate: Any, total: fx.Node) -> bool:
    """Returns whether a node has one row for each sample, or one for all of them: `[N, 1, C]` or `[1, 1, C]`."""
    factors, value = value_of(gate), value_of(total)
    if factors is None or value is None or factors.ndim != 3 or factors.dtype != value.dtype:
        return False
    is_row = factors.shape[0] in (1, value.shape[0]) and factors.shape[1:] == (1, value.shape[2])
    return is_row and has_numbers(factors) and factors.stride(2) == 1
