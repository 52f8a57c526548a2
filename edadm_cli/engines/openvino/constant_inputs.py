"""Finds the quantized layers whose input is the same in every call, such as the embedding of the frames of a clip.

The CPU plug-in computes what depends on no input while it compiles a graph, and cannot do so for codes: it ends with
"Check 'm_element_type.is_static()' failed" (OpenVINO 2026.4). These layers are computed in floating point with numbers
of the same values, which costs no time in a call.
"""

from __future__ import annotations

import openvino as ov

from edadm_cli.engines.openvino.products import coded_products

REASON = "its input is the same in every call, so that OpenVINO computes it once, while it compiles the graph"
"""Why a layer does not run in integers, as half a sentence."""


def compute_in_float(graph: ov.Model) -> frozenset[str]:
    """Replaces the codes of the layers whose input is constant with numbers of the same values, in place.

    Args:
        graph: A graph with static shapes, so that what is computed from shapes is constant too.

    Returns:
        The names of these layers.
    """
    varying = _varying(graph)
    products = list(coded_products(graph))
    constant = [product for product in products if product.node.input_value(0).get_node().get_name() not in varying]
    for product in constant:
        product.compute_in_float()
    return frozenset(product.layer for product in constant)


def _varying(graph: ov.Model) -> frozenset[str]:
    """Returns the names of the nodes whose values depend on the values of an input."""
    varying: set[str] = set()
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        sources = (value.get_node().get_name() for value in node.input_values())
        if kind == "Parameter" or (kind != "ShapeOf" and not varying.isdisjoint(sources)):
            varying.add(node.get_name())
    return frozenset(varying)
