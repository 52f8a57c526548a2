"""Quantization without learning, its weights rounded by GPTQ: error of outputs instead of error of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.ranges import folded, transform_tensors
from edadm_cli.hooks import Hooks
from edadm_cli.models.units import Trace, TracedLayer
from edadm_cli.quant.gptq import gptq_codes, input_columns
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.quant.transforms import transform_named

_POSITIONS = 8192  # of a batch that a layer's energies are taken from, evenly spread
_BYTES = 4 << 30  # of energies that are collected in one pass


def gptq_params(
    denoiser: nn.Module,
    traced: Trace,
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
) -> dict[str, Tensor]:
    """Returns the given ranges, and codes that GPTQ makes from the quantized inputs of the full-precision network.

    Grouped convolutions are rounded to nearest.

    Args:
        denoiser: With its full-precision layers in place.
        traced: Its trace.
        plan: Bits of every layer, and their transforms.
        ranges: The parameters that `search_ranges` returns.
        calls: `(args, kwargs)` of the denoiser over the calibration set; iterated once per group of layers.
    """
    layers = {layer.name: layer for layer in traced.layers if layer.name in plan.layers}
    params = nearest_params(lambda name: _weight(layers[name]), plan, ranges)
    for group in _groups([layer for layer in layers.values() if Operation.of(layer.module).groups == 1], plan):
        hessians = _hessians(denoiser, group, plan, ranges, calls)
        for layer in group:
            layer_plan = plan.layers[layer.name]
            pieces = layer_plan.split(_weight(layer))
            for part, piece in zip(layer_plan.part_names(layer.name), pieces, strict=True):
                weight, scale = folded(piece, part, layer_plan, ranges), ranges[f"{part}.weight_scale"]
                codes = gptq_codes(weight, scale, hessians.pop(part), layer_plan.weight_grid)
                params[f"{part}.weight_int"] = codes.cpu()
    return params


def _hessians(
    denoiser: nn.Module,
    layers: Sequence[TracedLayer],
    plan: QuantizationPlan,
    ranges: Mapping[str, Tensor],
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
) -> dict[str, Tensor]:
    """Returns X X^T of every layer's quantized input, or of its channel parts, with shape `(K, K)`."""
    sums: dict[str, Tensor] = {}

    def observe(layer: TracedLayer) -> Callable[..., None]:
        layer_plan, operation = plan.layers[layer.name], Operation.of(layer.module)
        weights = layer_plan.split(_weight(layer))
        names = layer_plan.part_names(layer.name)
        quantizers = [_quantizer(part, layer_plan, operation, ranges) for part in names]

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            pieces = layer_plan.split(inputs[0].detach(), operation.channel_dim)
            for part, piece, weight, quantizer in zip(names, pieces, weights, quantizers, strict=True):
                for few in _few(piece, operation):
                    x = few if quantizer is None else quantizer.to(few.device).fake_quantize(few)
                    columns = input_columns(x, operation, weight)
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
    """Yields a few rows of a convolution's input at a time, whose columns are larger than themselves."""
    return iter(x.split(8) if operation.kind == "conv2d" else (x,))


def _quantizer(part: str, plan: LayerPlan, operation: Operation, ranges: Mapping[str, Tensor]) -> InputQuantizer | None:
    if plan.input_grid is None:
        return None
    transform = None if plan.transform is None else transform_named(plan.transform)
    tensors = {} if transform is None else transform_tensors(transform, part, ranges)
    scale, zero_point = ranges[f"{part}.input_scale"], ranges[f"{part}.input_zero_point"]
    return InputQuantizer(plan.input_grid, scale, zero_point, operation.channel_dim, transform, tensors)


def _groups(layers: Sequence[TracedLayer], plan: QuantizationPlan) -> Iterator[list[TracedLayer]]:
    """Yields the layers in groups whose energies fit into memory together."""
    group: list[TracedLayer] = []
    held = 0
    for layer in layers:
        size = sum(4 * piece[0].numel() ** 2 for piece in plan.layers[layer.name].split(_weight(layer)))
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


def _weight(layer: TracedLayer) -> Tensor:
    return layer.module.get_parameter("weight").detach()
