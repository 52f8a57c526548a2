"""Reads and replaces nodes of the graphs that Dynamo traces, before torch has lowered them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_FUNCTIONS = {
    F.dropout,
    F.gelu,
    F.group_norm,
    F.layer_norm,
    F.scaled_dot_product_attention,
    F.silu,
    operator.add,
    operator.getitem,
    operator.mul,
    operator.truediv,
    torch.cat,
    torch.ops.edadm.conv2d.default,
    torch.ops.edadm.linear.default,
    torch.ops.edadm.linear_joined.default,
    torch.round,
}
_METHODS = {
    "chunk",
    "clamp",
    "contiguous",
    "expand",
    "flatten",
    "float",
    "permute",
    "reshape",
    "to",
    "transpose",
    "view",
}


def value_of(node: object) -> Tensor | None:
    """Returns the tensor without elements that stands for a node's result; `None` if the result is something else."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> torch.Size | None:
    """Returns the shape of a node's result."""
    value = value_of(node)
    return None if value is None else value.shape


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Returns the element type of a node's result."""
    value = value_of(node)
    return None if value is None else value.dtype


def has_numbers(x: Tensor) -> bool:
    """Returns whether all sizes and strides are numbers, and none is a symbol of a size that may change."""
    return all(type(size) is int for size in (*x.shape, *x.stride()))


def single_use(node: fx.Node) -> fx.Node | None:
    """Returns the only node that reads a node; `None` if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_method(node: fx.Node, name: str) -> bool:
    """Returns whether a node calls a method of a tensor."""
    return node.op == "call_method" and node.target == name


def is_call(node: object, function: object) -> TypeGuard[fx.Node]:
    """Returns whether a node calls a function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def operands_of(product: fx.Node) -> tuple[Any, ...] | None:
    """Returns codes, weights, scales, corrections and bias of a product; `None` if it adds a residual.

    For `linear_joined`, the codes of the columns that follow come last.
    """
    schema: Any = product.target
    names = [each.name for each in schema._schema.arguments]
    arguments = {**dict(zip(names, product.args, strict=False)), **product.kwargs}
    if arguments.get("residual") is not None:
        return None
    operands = tuple(arguments.get(name) for name in ("x", "weight", "scale", "correction", "bias"))
    return (*operands, arguments["more"]) if "more" in arguments else operands


def pays_for(pays: Callable[..., bool], operands: tuple[Any, ...]) -> bool:
    """Returns what `pays` says of the tensors that stand for the results of nodes; false if a size is a symbol."""
    values = [None if node is None else value_of(node) for node in operands]
    tensors = [value for value in values if value is not None]
    is_complete = len(tensors) == sum(node is not None for node in operands)
    return is_complete and all(map(has_numbers, tensors)) and pays(*values)


def replace_node(node: fx.Node, other: fx.Node) -> None:
    """Makes all users of a node read another one, and erases it and what only it has read."""
    value = value_of(node)
    if value is not None and "example_value" not in other.meta:
        other.meta["example_value"] = value
    node.replace_all_uses_with(other)
    _erase_unused(node)


def _erase_unused(node: fx.Node) -> None:
    """Erases nodes without users, from this one backwards, as far as they change nothing in place."""
    if node.users or not _is_pure(node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for each in inputs:
        _erase_unused(each)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS and not node.kwargs.get("inplace")
