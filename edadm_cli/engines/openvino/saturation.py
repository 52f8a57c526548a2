r"""Rewrites products that a processor cannot sum exactly in bytes into an exact form.

Without a dot product of bytes (VNNI) x86 adds two neighbouring products of an unsigned and a signed byte in 16 bits:

    s = saturate_16(u_0 w_0 + u_1 w_1),    certain only where  2 * 255 * max|w| <= 32,767,  so  max|w| <= 64

Weights of up to seven bits always fit. Wider ones take the exact form that `benchmarks/cpu_bytes.py` finds fastest:

    convolution    w = 2 h + r,   r in {0, 1}:   two products of bytes, each of which fits
    linear layer   float32 numbers of the same values, exact up to the rounding of float32 sums

Attention's products, signed on both sides, all go to float32, where OpenVINO makes one kernel of them and the softmax
between them, faster than in bytes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from edadm_cli.engines.base import LayerKind
from edadm_cli.engines.openvino.products import codes_of, quantized_products

LARGEST_WEIGHT_CODE = 64
REASON = "this processor adds products of bytes in 16 bits, which overflow"
"""Why a product does not run in integers, as half a sentence."""

_UNSIGNED_MAX, _SIGNED_MAX, _DEPTH = 255, 127, 64


@cache
def saturating_kinds() -> frozenset[LayerKind]:
    """Returns the kinds of products that OpenVINO sums inexactly on this processor, tested with the largest codes."""
    exact: dict[LayerKind, bool] = {
        "conv2d": _convolution_is_exact(),
        "linear": _linear_is_exact(),
        "attention": _attention_is_exact(),
    }
    return frozenset(kind for kind, is_exact in exact.items() if not is_exact)


def weights_saturate(codes: np.ndarray) -> bool:
    """Returns whether some input makes the sum of two neighbouring products of these codes exceed 16 bits."""
    return bool(codes.size) and max(int(codes.max()), -int(codes.min())) > LARGEST_WEIGHT_CODE


def replace_saturating_products(graph: ov.Model, kinds: frozenset[LayerKind]) -> frozenset[str]:
    """Turns the products that may saturate into exact ones of the same values, in place.

    Args:
        graph: A graph with int8 constants, whose four-bit constants are widened already.
        kinds: The kinds that saturate here; see `saturating_kinds`.

    Returns:
        The names of the layers that are now in floating point.
    """
    in_float = set()
    for product in quantized_products(graph):
        if product.kind not in kinds or (product.weight is not None and not weights_saturate(codes_of(product.weight))):
            continue
        if product.kind == "conv2d" and product.weight is not None:
            _add_halves(product.node, product.weight)
        else:
            product.compute_in_float()
            in_float.add(product.layer)
    return frozenset(in_float)


def _add_halves(convolution: ov.Node, scaled: ov.Node) -> None:
    """Replaces a convolution by w = 2 h + r with the sum of two convolutions, by h and by r."""
    codes, scales = codes_of(scaled), scaled.input_value(1).get_node().data
    source, readers = convolution.input_value(1).get_node(), convolution.output(0).get_target_inputs()
    low = _scaled_constant(codes & 1, scales)
    if source.get_type_name() == "Reshape":  # of a convolution in groups
        low = ops.reshape(low, source.input_value(1), special_zero=False)
    scaled.output(0).replace(_scaled_constant(codes >> 1, 2 * scales).output(0))
    attributes = convolution.get_attributes()
    make = ops.convolution if convolution.get_type_name() == "Convolution" else ops.group_convolution
    places = (attributes[name] for name in ("strides", "pads_begin", "pads_end", "dilations"))
    second = make(convolution.input_value(0), low, *places)
    second.friendly_name = f"{convolution.friendly_name}/low"
    total = ops.add(convolution, second)
    total.friendly_name = f"{convolution.friendly_name}/sum"
    for reader in readers:
        reader.replace_source_output(total.output(0))


def _scaled_constant(codes: np.ndarray, scales: np.ndarray) -> ov.Node:
    return ops.multiply(ops.convert(ov.op.Constant(codes), "f32"), _constant(scales))


def _constant(values: np.ndarray | np.float32) -> ov.Node:
    return ops.constant(np.asarray(values, np.float32))


def _byte_input(parameter: ov.Node, *, signed: bool) -> ov.Output:
    """Returns an input on the grid of all bytes with step one."""
    low, high = (-128, 127) if signed else (0, 255)
    bounds = [_constant(np.float32(value)) for value in (low, high, low, high)]
    return ops.fake_quantize(parameter, *bounds, 256).output(0)


def _largest_weight(*shape: int) -> ov.Output:
    scales = np.ones([shape[0], *[1] * (len(shape) - 1)], np.float32)
    return _scaled_constant(np.full(shape, _SIGNED_MAX, np.int8), scales).output(0)


def _convolution_is_exact() -> bool:
    parameter = ops.parameter([1, _DEPTH, 8, 8], ov.Type.f32)
    x, weight = _byte_input(parameter, signed=False), _largest_weight(_DEPTH, _DEPTH, 3, 3)
    product = ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    return _gives(product, [parameter], 9 * _DEPTH * _UNSIGNED_MAX * _SIGNED_MAX)


def _linear_is_exact() -> bool:
    parameter = ops.parameter([16, _DEPTH], ov.Type.f32)
    product = ops.matmul(_byte_input(parameter, signed=False), _largest_weight(_DEPTH, _DEPTH), False, True)
    return _gives(product, [parameter], _DEPTH * _UNSIGNED_MAX * _SIGNED_MAX)


def _attention_is_exact() -> bool:
    """Tries the product of queries and keys, both signed, and that of probabilities and values."""
    exact = []
    for signed, largest in ((True, _SIGNED_MAX), (False, _UNSIGNED_MAX)):
        parameters = [ops.parameter([2, 16, _DEPTH], ov.Type.f32) for _ in range(2)]
        left, right = _byte_input(parameters[0], signed=signed), _byte_input(parameters[1], signed=True)
        product = ops.matmul(left, right, False, True)
        exact.append(_gives(product, parameters, _DEPTH * largest * _SIGNED_MAX))
    return all(exact)


def _gives(product: ov.Node, parameters: list[ov.Node], expected: int) -> bool:
    """Returns whether every element of a product is `expected` where all inputs are at the end of their grids."""
    # where a rest in bfloat16 is the plug-in's choice, it would round the sums
    properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(ov.Model([product], parameters), "CPU", properties)
    inputs = [np.full(list(parameter.get_output_shape(0)), _UNSIGNED_MAX, np.float32) for parameter in parameters]
    return bool((compiled(inputs)[0] == np.float32(expected)).all())
