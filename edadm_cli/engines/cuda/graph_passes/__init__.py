"""Exchanges operations in the graphs that torch compiles, before Inductor lowers them.

`graph_pass` turns the exchanges on, and `inductor_pass` is the pass that Inductor calls. `graph_exchange` lists all
exchanges: `attention_graph`, `feed_forward_graph`, `norm_graph` and `group_norm_graph` replace an operation and the
quantizers behind it by one kernel, `residual_graph` a product and the addition behind it, and `joined_graph` the
concatenation in a single-stream block. `graph_nodes` and
`code_chains` find what they replace. `reductions` changes how Inductor writes normalizations.
"""
