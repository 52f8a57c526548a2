"""Joins attention and feed-forward as codes, in the single-stream blocks of FLUX that torch compiles.

The last layer of such a block reads the concatenation of an attention and of an activated product. Its codes are those
of both parts, which need no common tensor: the product writes its own, and the last layer reads two tensors.
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
    value_of,
)
from edadm_kernels.pack import CODE_OFFSET

_LINEAR, _LINEARS = torch.ops.edadm.linear.default, torch.ops.edadm.linears.default
_STEP = 128
"""The kernel reads two inputs side by side if the first one has a multiple of this many channels."""


def replace_joined(graph: fx.Graph) -> int:
    """Replaces what lies before the last layers of single-stream blocks in a graph of Dynamo; returns their number."""
    return sum(_replace(node) for node in graph.find_nodes(op="call_function", target=torch.cat))


def _replace(joined: fx.Node) -> int:
    parts: Any = joined.args[0]
    following = single_use(joined)
    chain = None if following is None else chain_of(following, 0)
    last = None if chain is None else _reader_of(chain)
    if chain is None or last is None or len(parts) != 2 or not _is_last(joined):
        return 0
    attended, activated = parts
    member = _activated_member(activated)
    width, operands = shape_of(attended), operands_of(last)
    if member is None or width is None or width[-1] % _STEP or operands is None:
        return 0
    together, place = member
    stacked: Any = together.args[1:5]
    member_operands = (together.args[0], *(each[place] for each in stacked))
    if not pays_for(kernels.gelu_pays, member_operands):
        return 0
    graph = joined.graph
    with graph.inserting_before(last):
        grid = (chain.inverse_scale, chain.shift, chain.num_bits)
        hidden = graph.call_function(torch.ops.edadm.linear_gelu_to_codes.default, (*member_operands, *grid))
        rows = graph.call_method("reshape", (_codes(attended, chain), -1, width[-1]))
        rows = graph.call_method("contiguous", (rows,))
        arguments = (rows, hidden, *operands[1:])
        product = graph.call_function(torch.ops.edadm.linear_joined.default, arguments, {"out_dtype": _dtype(last)})
    rows.meta["example_value"] = value_of(operands[0])[:, : width[-1]].contiguous()  # type: ignore[index]
    hidden.meta["example_value"] = value_of(operands[0])[:, width[-1] :].contiguous()  # type: ignore[index]
    replace_node(last, product)
    _leave_out(together, place)
    return 1


def _is_last(joined: fx.Node) -> bool:
    """Returns whether tensors are concatenated along their last dimension."""
    shape = shape_of(joined)
    dim = joined.kwargs.get("dim", joined.args[1] if len(joined.args) > 1 else 0)
    return shape is not None and dim in (-1, len(shape) - 1)


def _reader_of(chain: CodeChain) -> fx.Node | None:
    """Returns the product that alone reads some codes, as rows."""
    rows = single_use(chain.codes)
    dense = None if rows is None or not is_method(rows, "reshape") else single_use(rows)
    product = None if dense is None or not is_method(dense, "contiguous") or dense.kwargs else single_use(dense)
    return product if is_call(product, _LINEAR) and product.args[0] is dense else None


def _activated_member(activated: fx.Node) -> tuple[fx.Node, int] | None:
    """Returns the products and the place of the one among them whose GELU a node is, if nothing else reads it."""
    if not is_call(activated, F.gelu) or activated.kwargs.get("approximate") != "tanh" or len(activated.users) != 1:
        return None
    view: Any = activated.args[0]
    output: Any = view.args[0] if is_method(view, "view") and single_use(view) is activated else None
    if not is_call(output, operator.getitem) or single_use(output) is not view:
        return None
    together: Any = output.args[0]
    place: Any = output.args[1]
    takes_all = is_call(together, _LINEARS) and len(together.args) in (5, 6)
    is_unpacked = takes_all and all(is_call(user, operator.getitem) for user in together.users)
    return (together, place) if is_unpacked else None


def _codes(x: fx.Node, chain: CodeChain) -> fx.Node:
    """Returns the codes of a node for the grid of a chain, computed as a layer does."""
    graph, highest = x.graph, (1 << chain.num_bits) - 1 - CODE_OFFSET
    scaled = graph.call_function(operator.mul, (graph.call_method("float", (x,)), chain.inverse_scale))
    shifted = graph.call_function(operator.add, (graph.call_function(torch.round, (scaled,)), chain.shift))
    clamped = graph.call_method("clamp", (shifted, -CODE_OFFSET, highest))
    codes = graph.call_method("to", (clamped, torch.int8))
    codes.meta["example_value"] = value_of(x).to(torch.int8)  # type: ignore[union-attr]
    return codes


def _dtype(product: fx.Node) -> torch.dtype:
    value = value_of(product)
    assert value is not None
    return value.dtype


def _leave_out(together: fx.Node, place: int) -> None:
    """Replaces several products by those that are left without one of them, whose output nothing reads any more."""
    graph, members = together.graph, together.args[1:5]
    left = [[each for at, each in enumerate(member) if at != place] for member in members]  # type: ignore[arg-type]
    with graph.inserting_before(together):
        fewer = graph.call_function(_LINEARS, (together.args[0], *left, *together.args[5:]), dict(together.kwargs))
    for output in list(together.users):
        at: Any = output.args[1]
        if not output.users:
            graph.erase_node(output)
        else:
            output.args = (fewer, at - (at > place))
    graph.erase_node(together)
