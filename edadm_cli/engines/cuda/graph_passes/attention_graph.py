"""Runs the attention of any denoiser on the kernels of `edadm_kernels`, in the graphs that torch compiles.

Whatever processor a model has, its attention is a call of `scaled_dot_product_attention` in a graph of Dynamo.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.base import AttentionForm
from edadm_cli.engines.cuda.graph_passes.code_chains import CodeChain, code_chains
from edadm_cli.engines.cuda.graph_passes.graph_nodes import has_numbers, replace_node
from edadm_kernels.backend import uses_hopper

MIN_TOKENS = 1024
"""The least number of queries and keys for which 8-bit attention saves more than quantizing its operands costs."""
INT8_ATTENTION = (
    f"in eight bits from {MIN_TOKENS:,} queries and keys on and without a mask, otherwise in floating point"
)
NO_INT8_ATTENTION = "the kernel of attention in eight bits needs compute capability 9.0 and 16-bit operands"


def replace_attention(graph: fx.Graph, form: AttentionForm) -> int:
    """Replaces those attentions in a graph of Dynamo that become faster, in place, and returns their number."""
    attentions = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    return sum(_replace(node, form) for node in attentions)


def attend_int8_pays(q: Tensor, k: Tensor, scale: float) -> bool:
    """Returns whether `attend_int8` supports `q [N, heads, T, d]` and `k [N, heads, S, d]` and beats float16."""
    return min(q.shape[2], k.shape[2]) >= MIN_TOKENS and kernels.attend_int8_takes(q, k, scale)


def attend_pays(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> bool:
    """Returns whether `edadm_kernels` is faster than torch in 16-bit attention for `[N, heads, tokens, d]` here."""
    if not uses_hopper(q):
        return False
    operands = (q, k, v) if bias is None else (q, k, v, bias)
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in operands]
    if not kernels.attend_takes(meta[0], meta[1], meta[2], scale, *meta[3:]):
        return False
    sizes = (q.shape[2], k.shape[2], q.shape[3], q.shape[0] * q.shape[1])
    return bias is not None or kernels.attend_pays(*sizes)


def integer_kernel_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Returns whether a kernel multiplies codes in attention over heads of `width` channels in an element type.

    For the meta device the answer is that of compute capability 9.0.
    """
    probe = torch.empty(1, 1, 1, width, dtype=dtype, device=device)
    return kernels.attend_int8_takes(probe, probe, 1.0)


def _replace(node: fx.Node, form: AttentionForm) -> bool:
    call = _call_of(node)
    if call is None:
        return False
    operands, mask, scale = call
    shapes = [x.meta.get("example_value") for x in operands]
    heads = [x for x in shapes if isinstance(x, Tensor) and x.ndim == 4 and has_numbers(x) and x.stride(3) == 1]
    if len(heads) < len(shapes):
        return False
    q, k, v = heads
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    if v.shape != k.shape or q.shape[:2] != k.shape[:2]:
        return False
    if form == "int8" and mask is None and attend_int8_pays(q, k, scale):
        _exchange(node, torch.ops.edadm.attend_int8.default, (*operands, scale))
        return True
    bias = None
    if mask is not None:
        bias = _bias_of(mask, q, k)
        if bias is None:
            return False
    if not attend_pays(q, k, v, scale, bias):
        return False
    added: tuple[Any, ...] = ()
    if mask is not None:
        with node.graph.inserting_before(node):
            row = node.graph.call_function(operator.getitem, (mask, (slice(None), slice(None), 0)))
            added = (node.graph.call_method("expand", (row, *k.shape[:3])),)
    chains = code_chains(node) if q.dtype == torch.float16 else []
    if chains:
        _write_codes(node, chains, (*operands, scale), added)
    else:
        _exchange(node, torch.ops.edadm.attend.default, (*operands, scale, *added))
    return True


def _exchange(node: fx.Node, operation: Any, arguments: tuple[Any, ...]) -> None:
    """Replaces an attention by an operation that returns `[N, T, heads, d]`."""
    with node.graph.inserting_before(node):
        attended = node.graph.call_function(operation, arguments)
        exchanged = node.graph.call_method("transpose", (attended, 1, 2))
    replace_node(node, exchanged)


def _write_codes(node: fx.Node, chains: list[CodeChain], arguments: tuple[Any, ...], bias: tuple[Any, ...]) -> None:
    """Replaces an attention and the nodes that turn its result into codes by one operation."""
    graph = node.graph
    grids = ([chain.inverse_scale for chain in chains], [chain.shift for chain in chains])
    bits = [chain.num_bits for chain in chains]
    with graph.inserting_before(node):
        outputs = graph.call_function(
            torch.ops.edadm.attend_to_codes.default, (*arguments, *grids, bits, chains[0].stop, *bias)
        )
        pieces = [graph.call_function(operator.getitem, (outputs, place)) for place in range(len(chains))]
    for chain, piece in zip(chains, pieces, strict=True):
        replace_node(chain.codes, piece)


def _bias_of(mask: fx.Node, q: Tensor, k: Tensor) -> Tensor | None:
    """Returns the mask as numbers that are added per key, `[N, heads, S]`; `None` for any other mask."""
    value = mask.meta.get("example_value")
    if not isinstance(value, Tensor) or value.dtype != q.dtype or value.ndim != 4 or not has_numbers(value):
        return None
    if value.shape[2] != 1:
        return None
    if value.shape[3] != k.shape[2] or any(n not in (1, m) for n, m in zip(value.shape[:2], q.shape[:2], strict=True)):
        return None
    return value[:, :, 0].expand(*k.shape[:3])


def _call_of(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float | None] | None:
    """Returns the queries, keys and values of a call, its mask and its scale.

    The result is `None` for a call with a causal mask, dropout or shared heads.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    operands = [arguments.get(name) for name in names[:3]]
    plain = not any(arguments.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    scale, mask = arguments.get("scale"), arguments.get("attn_mask")
    if not plain or not isinstance(mask, fx.Node | None) or not isinstance(scale, float | None):
        return None
    return (operands, mask, scale) if all(isinstance(x, fx.Node) for x in operands) else None  # type: ignore[return-value]
