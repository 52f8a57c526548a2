"""Replaces a product, its activation and the codes of the next layer by one operation in graphs that torch compiles.

The activations are GELU in its approximation by a hyperbolic tangent, and GEGLU. A feed-forward layer of a loaded
export then takes two launches. If anything else reads or changes what lies between its layers, as a LoRA adapter does,
the graph stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.cuda.graph_passes.code_chains import CodeChain, chain_of
from edadm_cli.engines.cuda.graph_passes.graph_nodes import (
    is_call,
    is_method,
    operands_of,
    pays_for,
    replace_node,
    shape_of,
    single_use,
)

_LINEAR = torch.ops.edadm.linear.default


def replace_feed_forwards(graph: fx.Graph) -> int:
    """Replaces those products with an activation in a graph of Dynamo that become faster; returns their number."""
    return sum(_replace(node) for node in graph.find_nodes(op="call_function", target=F.gelu))


def _replace(gelu: fx.Node) -> int:
    source: Any = gelu.args[0]
    activated: fx.Node | None = gelu
    if gelu.kwargs.get("approximate") == "tanh":
        operation, pays = torch.ops.edadm.linear_gelu_to_codes.default, kernels.gelu_pays
    else:
        operation, pays = torch.ops.edadm.linear_geglu_to_codes.default, kernels.geglu_pays
        source, activated = _gated(gelu)
    product = _product_of(source)
    chain = None if activated is None else _codes_of(activated)
    shape = None if chain is None else shape_of(chain.codes)
    if product is None or chain is None or shape is None or not all(type(size) is int for size in shape):
        return 0
    operands = operands_of(product)
    if operands is None or not pays_for(pays, operands):
        return 0
    graph = gelu.graph
    with graph.inserting_before(chain.codes):
        codes = graph.call_function(operation, (*operands, chain.inverse_scale, chain.shift, chain.num_bits))
        codes = graph.call_method("view", (codes, *shape))
    replace_node(chain.codes, codes)
    return 1


def _gated(gelu: fx.Node) -> tuple[Any, fx.Node | None]:
    """Returns the tensor of values and gates, and the node of the gated values; twice `None` for anything else.

    values, gates = x.chunk(2, dim=-1);   values * gelu(gates)
    """
    gates, product = gelu.args[0], single_use(gelu)
    if not is_call(gates, operator.getitem) or gates.args[1] != 1 or not is_call(product, operator.mul):
        return None, None
    pieces: Any = gates.args[0]
    others: list[Any] = [node for node in product.args if node is not gelu]
    values: Any = others[0] if len(others) == 1 else None
    is_pair = is_call(values, operator.getitem) and values.args == (pieces, 0)
    if not is_pair or not is_method(pieces, "chunk") or len(pieces.users) != 2 or len(gates.users) != 1:
        return None, None
    source: Any = pieces.args[0]
    shape = shape_of(source) if isinstance(source, fx.Node) else None
    dim = pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0)
    is_last = shape is not None and dim in (-1, len(shape) - 1)
    has_halves = is_last and pieces.args[1:2] == (2,) and shape[-1] % 2 == 0  # type: ignore[index]
    return (source, product) if has_halves and len(values.users) == 1 else (None, None)


def _product_of(source: Any) -> fx.Node | None:
    """Returns the product whose result a node holds with other leading dimensions, if only that node reads it."""
    if not isinstance(source, fx.Node) or not is_method(source, "view"):
        return None
    product: Any = source.args[0]
    is_product = is_call(product, _LINEAR) and single_use(product) is source
    shapes = shape_of(source), shape_of(product) if is_product else None
    return product if shapes[0] is not None and shapes[1] is not None and shapes[0][-1] == shapes[1][-1] else None


def _codes_of(activated: fx.Node) -> CodeChain | None:
    """Returns the chain of codes that alone reads an activated tensor, behind a dropout that does nothing."""
    following = single_use(activated)
    if is_call(following, F.dropout) and following.args[2:3] == (False,):
        following = single_use(following)
    return None if following is None else chain_of(following, 0)
