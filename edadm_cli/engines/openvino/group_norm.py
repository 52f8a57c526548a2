r"""Computes group normalization in the layout of convolutions, from statistics of rows.

OpenVINO's own form reorders its input from channels last to channels first, and its output back, which takes longer
than the normalization. Means and norms of rows need no reordering:

    m_r = mean of row r,   q_r = mean of squares of row r,   c = mean of all m_r of a group
    variance = mean of (q_r - c (2 m_r - c)) - d^2,   d = mean of (m_r - c)
    y = (x - c) a + (bias - d a),   a = scale / sqrt(variance + epsilon)

In bfloat16 each m_r, q_r and c is rounded. A mean over hundreds of rows averages their errors, and d holds the error of
c, so that the result is as near to that of float32 as OpenVINO's own form, also where the mean is large.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

_NORM = "GroupNormalization"
_IMAGE_RANK = 4


def normalize_by_rows(graph: ov.Model) -> int:
    """Rewrites every group normalization of images in a graph with static shapes, in place; returns their number."""
    norms = [node for node in graph.get_ops() if node.get_type_name() == _NORM]
    images = [node for node in norms if len(node.get_input_shape(0)) == _IMAGE_RANK]
    for norm in images:
        normalized = _normalized(norm)
        normalized.friendly_name = norm.friendly_name
        norm.output(0).replace(normalized.output(0))
    return len(images)


def _normalized(norm: ov.Node) -> ov.Node:
    """Returns the output of a group normalization of `[N, C, H, W]`."""
    x, scale, bias = norm.input_values()
    attributes = norm.get_attributes()
    groups, epsilon = attributes["num_groups"], attributes["epsilon"]
    batch, channels, height, width = norm.get_input_shape(0)
    members = channels // groups

    def per_group(values: ov.Output | ov.Node, count: int) -> ov.Node:
        return ops.reshape(values, _integers(-1, groups, count), special_zero=False)  # [N or 1, G, count]

    def mean(values: ov.Node) -> ov.Node:
        return ops.reduce_mean(values, _integers(2), keep_dims=True)  # [N, G, 1]

    def per_channel(values: ov.Node) -> ov.Node:
        return ops.reshape(values, _integers(batch, channels, 1, 1), special_zero=False)

    means = per_group(ops.reduce_mean(x, _integers(3), keep_dims=True), members * height)
    lengths = per_group(ops.reduce_l2(x, _integers(3), keep_dims=True), members * height)
    squares = ops.multiply(ops.multiply(lengths, lengths), _number(1 / width))
    center = mean(means)
    rest = mean(ops.subtract(means, center))
    moment = mean(ops.subtract(squares, ops.multiply(center, ops.subtract(ops.multiply(means, _number(2)), center))))
    variance = ops.subtract(moment, ops.multiply(rest, rest))
    factor = ops.multiply(ops.power(ops.add(variance, _number(epsilon)), _number(-0.5)), per_group(scale, members))
    offset = ops.subtract(per_group(bias, members), ops.multiply(rest, factor))
    centers = ops.multiply(center, ops.constant(np.ones((1, groups, members), np.float32)))
    centered = ops.subtract(x, per_channel(centers))
    return ops.add(ops.multiply(centered, per_channel(factor)), per_channel(offset))


def _integers(*values: int) -> ov.Node:
    return ops.constant(np.asarray(values, np.int64))


def _number(value: float) -> ov.Node:
    return ops.constant(np.float32(value))
