"""Replaces adaptive normalizations and the codes of their results in the graphs that torch compiles.

Inductor computes a row of 1,152 channels as one of 2,048, of which the last are masked, with all warps of a block. The
kernel of `edadm_kernels` takes such a row in two pieces.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from edadm_cli.engines.cuda.graph_passes.code_chains import chain_of
from edadm_cli.engines.cuda.graph_passes.graph_nodes import has_numbers, replace_node, value_of
from edadm_kernels.backend import uses_kernel

MIN_ELEMENTS = 1 << 22
"""The least number of elements from which on a kernel of its own is faster than one fused with what is before it."""


def norm_pays(x: Tensor) -> bool:
    """Returns whether the kernel runs for `x [N, T, C]` on its device and is faster than what Inductor makes."""
    return x.is_cuda and uses_kernel(x) and x.numel() >= MIN_ELEMENTS


def replace_norms(graph: fx.Graph) -> int:
    """Replaces those adaptive normalizations in a graph of Dynamo that become faster; returns their number.

    norm(x) * (1 + scale) + shift, and the codes of that
    """
    return sum(_replace(norm) for norm in graph.find_nodes(op="call_function", target=F.layer_norm))


def _replace(norm: fx.Node) -> int:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    arguments = {**dict(zip(names, norm.args, strict=False)), **norm.kwargs}
    x, eps = arguments.get("input"), arguments.get("eps", 1e-5)
    value = value_of(x)
    if not isinstance(x, fx.Node) or value is None or value.ndim != 3 or not isinstance(eps, float):
        return 0
    if not has_numbers(value):
        return 0
    shape = arguments.get("normalized_shape")
    is_plain = arguments.get("weight") is None and arguments.get("bias") is None
    if not is_plain or tuple(shape or ()) != tuple(value.shape[2:]) or not norm_pays(value):  # type: ignore[arg-type]
        return 0
    return sum(_replace_modulation(product, norm, x, eps, value) for product in list(norm.users))


def _replace_modulation(product: fx.Node, norm: fx.Node, x: fx.Node, eps: float, value: Tensor) -> int:
    """Replaces one product of a normalization with `1 + scale` and all that follows, up to the codes."""
    gain = _other(product, operator.mul, norm)
    scale = None if not isinstance(gain, fx.Node) else _other(gain, operator.add, 1)
    result = next(iter(product.users)) if len(product.users) == 1 else None
    shift = None if result is None else _other(result, operator.add, product)
    if not isinstance(scale, fx.Node) or not isinstance(shift, fx.Node) or result is None:
        return 0
    if not _is_per_sample(scale, value) or not _is_per_sample(shift, value):
        return 0
    chains = [chain_of(user, value.shape[1]) for user in result.users]
    if not chains or any(chain is None or (chain.start, chain.stop) != (0, value.shape[1]) for chain in chains):
        return 0
    graph = result.graph
    for chain in chains:
        assert chain is not None
        with graph.inserting_before(chain.codes):
            rows = [
                graph.call_method("expand", (graph.call_function(operator.getitem, (node, _FIRST)), *_samples(value)))
                for node in (scale, shift)
            ]
            codes = graph.call_function(
                torch.ops.edadm.modulated_norm_quantize.default,
                (x, *rows, eps, chain.inverse_scale, chain.shift, chain.num_bits),
            )
        replace_node(chain.codes, codes)
    return 1


_FIRST = (slice(None), 0)


def _samples(value: Tensor) -> tuple[int, int]:
    return value.shape[0], value.shape[2]


def _is_per_sample(node: fx.Node, x: Tensor) -> bool:
    """Returns whether a node has one row per sample, or one for all samples: `[N, 1, C]` or `[1, 1, C]`."""
    value = value_of(node)
    if value is None or value.ndim != 3 or not value.is_floating_point():
        return False
    return value.shape[0] in (1, x.shape[0]) and value.shape[1:] == (1, x.shape[2])


def _other(node: fx.Node, function: object, operand: object) -> object:
    """Returns the other operand of a function of two; `None` if the node is something else."""
    if node.op != "call_function" or node.target is not function or len(node.args) != 2:
        return None
    first, second = node.args
    if first is operand or (isinstance(first, int) and first == operand):
        return second
    if second is operand or (isinstance(second, int) and second == operand):
        return first
    return None
