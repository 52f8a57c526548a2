r"""Rewrites scale and shift after a GroupNormalization into a form that OpenVINO can compile.

    y = n * (1 + s)   becomes   y = n + n * s

In float32, OpenVINO 2026.4 ends the process with a segmentation fault where a GroupNormalization is multiplied by such
a sum, as in residual blocks with `resnet_time_scale_shift="scale_shift"`.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops

_NORM, _SCALE, _SUM, _CONSTANT = "GroupNormalization", "Multiply", "Add", "Constant"
_KEEPS_ONE = ("Multiply", "Convert", "ConvertLike", "Reshape", "Unsqueeze", "Broadcast")
"""Operations that return ones if their first input holds ones; a product needs both inputs to hold ones."""


def distribute_scales(graph: ov.Model) -> int:
    """Rewrites every such product in place, and returns how many there were."""
    count = 0
    for norm in [node for node in graph.get_ops() if node.get_type_name() == _NORM]:
        for target in list(norm.output(0).get_target_inputs()):
            product = target.get_node()
            scale = _scale_beside_one(product, target.get_index()) if product.get_type_name() == _SCALE else None
            if scale is None:
                continue
            normalized = norm.output(0)
            scaled = ops.add(normalized, ops.multiply(normalized, scale))
            scaled.set_friendly_name(product.get_friendly_name())
            for reader in list(product.output(0).get_target_inputs()):
                reader.replace_source_output(scaled.output(0))
            count += 1
    return count


def _scale_beside_one(product: ov.Node, index: int) -> ov.Output | None:
    """Returns `s` if the other factor of a product is `1 + s`, and `None` otherwise."""
    factor = product.input_value(1 - index).get_node()
    if factor.get_type_name() != _SUM:
        return None
    first, second = factor.input_value(0), factor.input_value(1)
    if _is_one(first):
        return second
    return first if _is_one(second) else None


def _is_one(value: ov.Output) -> bool:
    node = value.get_node()
    kind = node.get_type_name()
    if kind == _CONSTANT:
        return bool(np.all(node.get_data() == 1))
    inputs = node.input_values()
    needed = inputs if kind == "Multiply" else inputs[:1]
    return kind in _KEEPS_ONE and all(map(_is_one, needed))
