"""Runs the attention of any denoiser on the kernels of `edadm_kernels`, in the graphs that torch compiles.

Whatever processor a model has, its attention is a call of `scaled_dot_product_attention` in a graph of Dynamo. The
backend of this module replaces these calls and passes the graph to Inductor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import edadm_kernels as kernels
from edadm_cli.engines.base import AttentionForm
from edadm_cli.engines.cuda.reductions import rows_in_registers
from edadm_kernels.backend import uses_hopper

MIN_TOKENS = 1024
"""The least number of queries and keys for which 8-bit attention saves more than quantizing its operands costs."""
INT8_ATTENTION = (
    f"in eight bits from {MIN_TOKENS:,} queries and keys on and without a mask, otherwise in floating point"
)

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]


@lru_cache(maxsize=8)
def attention_backend(form: AttentionForm) -> Backend:
    """Returns a backend for `torch.compile`: Inductor, with the kernels of `edadm_kernels` for attention if faster.

    It returns one object per form, so that equal blocks share a compilation.
    """

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        replace_attention(graph, form)
        with rows_in_registers():
            compiled: Callable[..., Any] = compile_fx(graph, inputs)  # type: ignore[assignment]
        return compiled

    return compile_graph


def replace_attention(graph: fx.GraphModule, form: AttentionForm) -> int:
    """Replaces those attentions in a graph of Dynamo that become faster, in place, and returns their number."""
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention and _replace(node, form):
            replaced += 1
    if replaced:
        graph.graph.lint()
        graph.recompile()
    return replaced


def attend_int8_pays(q: Tensor, k: Tensor, scale: float) -> bool:
    """Returns whether `attend_int8` supports `q [N, heads, T, d]` and `k [N, heads, S, d]` and beats float16."""
    return min(q.shape[2], k.shape[2]) >= MIN_TOKENS and kernels.attend_int8_takes(q, scale)


def attend_pays(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Returns whether `edadm_kernels` is faster than torch in 16-bit attention for `[N, heads, tokens, d]` here."""
    if not uses_hopper(q):
        return False
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (q, k, v)]
    sizes = (q.shape[2], k.shape[2], q.shape[3], q.shape[0] * q.shape[1])
    return kernels.attend_takes(meta[0], meta[1], meta[2], scale) and kernels.attend_pays(*sizes)


def grid_kernel_runs(device: torch.device, width: int) -> bool:
    """Returns whether a kernel computes attention on a model's own grids for heads of `width` channels."""
    if device.type != "cuda":
        return False
    probe = torch.empty(1, 1, 1, width, dtype=torch.float16, device=device)
    return kernels.attend_int8_takes(probe, 1.0)


def _operation(q: Tensor, k: Tensor, v: Tensor, scale: float, form: AttentionForm) -> Any:
    """Returns the operation that replaces torch's attention; `None` if no other operation is faster."""
    if form == "int8" and attend_int8_pays(q, k, scale):
        return torch.ops.edadm.attend_int8.default
    return torch.ops.edadm.attend.default if attend_pays(q, k, v, scale) else None


def _replace(node: fx.Node, form: AttentionForm) -> bool:
    call = _call_of(node)
    if call is None:
        return False
    operands, scale = call
    shapes = [x.meta.get("example_value") for x in operands]
    heads = [x for x in shapes if isinstance(x, Tensor) and x.ndim == 4 and x.stride(3) == 1]
    if len(heads) < len(shapes):
        return False
    q, k, v = heads
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    if v.shape != k.shape or q.shape[:2] != k.shape[:2]:
        return False
    operation = _operation(q, k, v, scale, form)
    if operation is None:
        return False
    with node.graph.inserting_before(node):
        attended = node.graph.call_function(operation, (*operands, scale))
        exchanged = node.graph.call_method("transpose", (attended, 1, 2))
    node.replace_all_uses_with(exchanged)
    node.graph.erase_node(node)
    return True


def _call_of(node: fx.Node) -> tuple[list[fx.Node], float | None] | None:
    """Returns the queries, keys and values of a call and its scale.

    The result is `None` for a call with a mask, a causal mask, dropout or shared heads.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    operands = [arguments.get(name) for name in names[:3]]
    plain = not any(arguments.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    scale = arguments.get("scale")
    if not plain or arguments.get("attn_mask") is not None or not isinstance(scale, float | None):
        return None
    return (operands, scale) if all(isinstance(x, fx.Node) for x in operands) else None  # type: ignore[return-value]
