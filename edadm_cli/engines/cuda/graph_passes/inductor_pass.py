"""The pass that Inductor runs over graphs of Dynamo, in a module of its own since its base class is slow to import."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from edadm_cli.engines.cuda.graph_passes.graph_exchange import exchange
from edadm_cli.version import __version__

_SOURCES = (
    *("attention_graph.py", "code_chains.py", "feed_forward_graph.py", "graph_exchange.py", "graph_nodes.py"),
    *("group_norm_graph.py", "inductor_pass.py", "joined_graph.py", "norm_graph.py", "residual_graph.py"),
)


class Exchanges(CustomGraphPass):
    """The pass over graphs that contain operations of `edadm_kernels`; other graphs stay as they are.

    Args:
        others: The passes that were there before, which run first.
    """

    def __init__(self, others: tuple[Any, ...] = ()) -> None:
        self.others = others

    def __call__(self, graph: fx.Graph) -> None:
        """Changes a graph in place."""
        for other in self.others:
            other(graph)
        if any(getattr(node.target, "namespace", None) == "edadm" for node in graph.nodes):
            exchange(graph)

    def uuid(self) -> Any | None:
        """Returns a key of what the pass does, for torch's caches; `None`, which turns them off, if one is unknown."""
        keys = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        return None if None in keys else (__version__, _hash_of_sources(), *keys)


@lru_cache(maxsize=1)
def _hash_of_sources() -> bytes:
    folder = Path(__file__).parent
    return get_hash_for_files(tuple(str(folder / name) for name in _SOURCES))
