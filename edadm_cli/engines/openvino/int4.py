"""Four-bit constants, which are two codes per byte in the files and int8 when the graph is compiled.

OpenVINO's low-precision transformations do not support four-bit convolution weights, so loading widens the codes.
"""

from __future__ import annotations

import numpy as np
import openvino as ov


def int4_constant(codes: np.ndarray) -> ov.Node:
    """Returns an i4 constant of int8 codes in -8..7, with any shape; the earlier code is in the low half of a byte."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    halves = flat.view(np.uint8) & 0xF
    # a tensor that owns its memory: one made from an array would only borrow it
    tensor = ov.Tensor(ov.Type.i4, list(codes.shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = halves[0::2] | halves[1::2] << 4
    return ov.op.Constant(tensor)


def int4_codes(constant: ov.op.Constant) -> np.ndarray:
    """Returns the int8 codes of an i4 constant."""
    packed = constant.data.view(np.uint8).reshape(-1)
    codes = np.empty((packed.size, 2), np.uint8)
    codes[:, 0], codes[:, 1] = packed & 0xF, packed >> 4
    signed = ((codes ^ 8).astype(np.int8) - np.int8(8)).reshape(-1)
    shape = list(constant.get_output_shape(0))
    return signed[: int(np.prod(shape))].reshape(shape)


def widen(model: ov.Model) -> None:
    """Replaces every i4 constant of a graph with an int8 one, in place."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.i4:
            wide = ov.op.Constant(int4_codes(node))
            wide.friendly_name = node.friendly_name
            node.output(0).replace(wide.output(0))
