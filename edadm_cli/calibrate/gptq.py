"""Quantizes without learning, with weights rounded by GPTQ: it minimises the error of outputs, not of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.transforming import folded, input_quantizer
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace, TracedLayer
from edadm_cli.quant.gptq import gptq_codes, input_columns
from edadm_cli.quant.groups import per_weight
from edadm_cli.quant.operation import Operation, weight_shape
from edadm_cli.quant.plan import QuantizationPlan

_POSITIONS = 8192  # positions per batch, evenly spread, from which the Hessians of a layer are computed
_BYTES = 4 << 30  # bytes of Hessians that are collected in one pass


def gptq_params(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
    calls: Iterable[Call],
) -> dict[str, Tensor]:
    """Returns the given ranges, with codes that GPTQ rounds by the quantized inputs of the full-precision denoiser.

    The weights of grouped convolutions are rounded to nearest.

    Args:
        denoiser: The denoiser with its full-precision layers in place.
        traced: The trace of the denoiser.
        plan: The bits and the transform of every layer.
        ranges: The parameters that `search_ranges` returns.
        calls: The `(args, kwargs)` of the denoiser's calls over the calibration set. They are iterated once per group
            of layers.
    """
    layers = {layer.name: layer for layer in traced.layers if layer.name in plan.layers}
    params = nearest_params(lambda name: layers[name].weight, plan, ranges)
    for group in _groups([layer for layer in layers.values() if Operation.of(layer.module).groups == 1], plan):
        hessians = _hessians(denoiser, group, plan, ranges, calls)
        for layer in group:
            layer_plan = plan.layers[layer.name]
            pieces = layer_plan.split(layer.weight)
            for part, piece in zip(layer_plan.part_names(layer.name), pieces, strict=True):
                weight, scale = folded(piece, part, layer_plan, ranges), ranges[f"{part}.weight_scale"]
                multipliers = ranges.get(f"{part}.weight_multiplier")
                factors = None
                if multipliers is not None and layer_plan.group_size is not None:
                    factors = per_weight(multipliers, tuple(weight.shape), layer_plan.group_size)
                codes = gptq_codes(weight, scale, hessians.pop(part), layer_plan.weight_grid, factors)
                params[f"{part}.weight_int"] = codes.cpu()
    return params


def _hessians(
    denoiser: nn.Module,
    layers: Sequence[TracedLayer],
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
    calls: Iterable[Call],
) -> dict[str, Tensor]:
    """Returns the Hessian X X^T of the quantized input of each layer, or of each part, by name, with shape `(K, K)`."""
    sums: dict[str, Tensor] = {}

    def observe(layer: TracedLayer) -> Callable[..., None]:
        layer_plan, operation = plan.layers[layer.name], Operation.of(layer.module)
        kernel, names = weight_shape(layer.module)[2:], layer_plan.part_names(layer.name)
        quantizers = [input_quantizer(part, layer_plan, operation, ranges) for part in names]

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            pieces = layer_plan.split(inputs[0].detach(), operation.channel_dim)
            for part, piece, quantizer in zip(names, pieces, quantizers, strict=True):
                for few in _few(piece, operation):
                    x = few if quantizer is None else quantizer.to(few.device).fake_quantize(few)
                    columns = input_columns(x, operation, kernel)
                    columns = columns[:: max(1, len(columns) * len(piece) // (len(few) * _POSITIONS))]
                    product = columns.T @ columns
                    sums[part] = product if part not in sums else sums[part].add_(product)

        return hook

    with Hooks() as hooks, torch.no_grad():
        for layer in layers:
            hooks.before(layer.module, observe(layer))
        for args, kwargs in calls:
            denoiser(*args, **kwargs)
    return sums


def _few(x: Tensor, operation: Operation) -> Iterator[Tensor]:
    """Yields an input in pieces: a few rows at a time for a convolution, because its columns take more memory."""
    return iter(x.split(8) if operation.kind == "conv2d" else (x,))


def _groups(layers: Sequence[TracedLayer], plan: QuantizationPlan) -> Iterator[list[TracedLayer]]:
    """Yields the layers in groups whose Hessians fit into memory together."""
    group: list[TracedLayer] = []
    held = 0
    for layer in layers:
        _, inputs, *kernel = weight_shape(layer.module)
        parts = plan.layers[layer.name].channel_parts or (inputs,)
        size = sum(4 * (channels * math.prod(kernel)) ** 2 for channels in parts)
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group
