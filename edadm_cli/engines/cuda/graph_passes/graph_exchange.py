"""All exchanges of operations in a graph of Dynamo, for `graph_pass.attention_backend` and for `inductor_pass`."""

from __future__ import annotations

from torch import fx

from edadm_cli.engines.base import AttentionForm
from edadm_cli.engines.cuda.graph_passes.attention_graph import replace_attention
from edadm_cli.engines.cuda.graph_passes.feed_forward_graph import replace_feed_forwards
from edadm_cli.engines.cuda.graph_passes.group_norm_graph import replace_group_norms
from edadm_cli.engines.cuda.graph_passes.joined_graph import replace_joined
from edadm_cli.engines.cuda.graph_passes.norm_graph import replace_norms
from edadm_cli.engines.cuda.graph_passes.residual_graph import replace_additions


def exchange(graph: fx.Graph, form: AttentionForm = "float") -> int:
    """Replaces what becomes faster in a graph of Dynamo, in place, and returns the number of replacements.

    Args:
        graph: The graph.
        form: The form of attention that is preferred.
    """
    joined = replace_joined(graph)  # first, as attention then writes the codes of its part
    replaced = joined + replace_attention(graph, form) + replace_norms(graph) + replace_group_norms(graph)
    return replaced + replace_feed_forwards(graph) + replace_additions(graph)
