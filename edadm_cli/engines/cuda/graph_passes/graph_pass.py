"""Exchanges operations in every graph with layers of an export that Inductor compiles, whoever calls `torch.compile`.

Inductor's configuration has a place for one pass over the graphs of Dynamo. Since torch 2.12 each thread has a value of
its own there, so the pass is put there while a layer is traced: in the thread that compiles, and only if an export is
compiled. A pass that is there already runs first. Other compilers leave the graphs as they are, which gives the same
results in more time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from edadm_cli.engines.base import AttentionForm
from edadm_cli.engines.cuda.graph_passes.graph_exchange import exchange
from edadm_cli.engines.cuda.graph_passes.reductions import rows_in_registers

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]


@torch.compiler.assume_constant_result
def exchange_in_graphs() -> bool:
    """Puts `Exchanges` into Inductor's configuration; torch calls this function where it traces it."""
    from torch._inductor import config

    from edadm_cli.engines.cuda.graph_passes.inductor_pass import Exchanges

    present: Any = config.pre_grad_custom_pass
    if not isinstance(present, Exchanges):
        others = tuple(present) if isinstance(present, list | tuple) else () if present is None else (present,)
        config.pre_grad_custom_pass = Exchanges(others)
    return True


@lru_cache(maxsize=8)
def attention_backend(form: AttentionForm) -> Backend:
    """Returns a backend for `torch.compile`: Inductor, with the kernels of `edadm_kernels` for attention if faster.

    It returns one object per form, so that equal blocks share a compilation.
    """

    def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        exchange(graph.graph, form)
        graph.recompile()
        with rows_in_registers():
            compiled: Callable[..., Any] = compile_fx(graph, inputs)  # type: ignore[assignment]
        return compiled

    return compile_graph
