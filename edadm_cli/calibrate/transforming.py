"""Computes the tensors of a plan's transforms, and applies the transforms to inputs and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from edadm_cli.errors import UsageError
from edadm_cli.models.units import Trace
from edadm_cli.plugins import wrong_result
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.quant.transforms import ChannelStatistics, Transform, transform_named
from edadm_cli.recipe import TransformRule, last_match


def calibrate_transforms(
    traced: Trace,
    plan: QuantizationPlan,
    rules: Sequence[TransformRule],
    statistics: Mapping[str, ChannelStatistics],
) -> dict[str, Tensor]:
    """Returns the tensors of all planned transforms, `<layer>.<tensor>`, each with shape `(C_in,)`, float32.

    Args:
        traced: The trace of the denoiser.
        plan: The bits and transforms of every layer.
        rules: The rules of the recipe, for the options of the transforms.
        statistics: The statistics of the inputs of the layers with transforms, by name; by part for split layers.

    Raises:
        UsageError: A transform does not have an option that the recipe gives it.
        MachineError: A transform of another package returned other tensors than it names.
    """
    params: dict[str, Tensor] = {}
    for layer in traced.layers:
        layer_plan = plan.layers.get(layer.name)
        if layer_plan is None or layer_plan.transform is None:
            continue
        transform = transform_named(layer_plan.transform)
        options = _options(transform, last_match(rules, layer.name))
        pieces = layer_plan.split(layer.weight)
        for part, piece in zip(layer_plan.part_names(layer.name), pieces, strict=True):
            tensors = _calibrated(transform, piece.cpu(), statistics[part], options)
            params |= {f"{part}.{name}": tensor.float().cpu() for name, tensor in tensors.items()}
    return params


def transform_tensors(transform: Transform, part: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a transform among parameters under their full names."""
    return {name: params[f"{part}.{name}"] for name in transform.tensors}


def transformed(x: Tensor, transform: Transform, tensors: Mapping[str, Tensor], channel_dim: int) -> Tensor:
    """Returns the input of a layer as its transform changes it.

    Raises:
        MachineError: A transform of another package returned something else than a tensor with the shape of `x`.
    """
    return _require_shape_of(x, transform, transform.apply(x, tensors, channel_dim))


def folded(weight: Tensor, part: str, plan: LayerPlan, params: Mapping[str, Tensor]) -> Tensor:
    """Returns the weight that is rounded to codes, with the inverse of its layer's transform folded in, if any.

    Raises:
        MachineError: A transform of another package returned something else than a tensor with the weight's shape.
    """
    if plan.transform is None:
        return weight
    transform = transform_named(plan.transform)
    return _require_shape_of(weight, transform, transform.fold(weight, transform_tensors(transform, part, params)))


def input_quantizer(
    part: str, plan: LayerPlan, operation: Operation, params: Mapping[str, Tensor]
) -> InputQuantizer | None:
    """Returns the quantizer of the input of a layer, or of a part of it; `None` if the input is left in float."""
    if plan.input_grid is None:
        return None
    transform = None if plan.transform is None else transform_named(plan.transform)
    tensors = {} if transform is None else transform_tensors(transform, part, params)
    scale, zero_point = params[f"{part}.input_scale"], params[f"{part}.input_zero_point"]
    return InputQuantizer(plan.input_grid, scale, zero_point, operation.channel_dim, transform, tensors)


def _options(transform: Transform, rule: TransformRule | None) -> dict[str, float]:
    """Returns the options of a transform: its own, and those of the recipe's rule in their place."""
    options = {**transform.options, **(rule.options if rule else {})}
    unknown = sorted(options.keys() - transform.options.keys())
    if unknown:
        known = ", ".join(transform.options) or "none"
        raise UsageError(f"The transform '{transform.name}' has no option '{unknown[0]}'; its options are: {known}.")
    return options


def _calibrated(
    transform: Transform, weight: Tensor, statistics: ChannelStatistics, options: Mapping[str, float]
) -> Mapping[str, Tensor]:
    tensors = transform.calibrate(weight, statistics, options)
    if not isinstance(tensors, Mapping) or set(tensors) != set(transform.tensors):
        names = ", ".join(map(repr, transform.tensors)) or "nothing"
        raise wrong_result(f"The transform '{transform.name}'", transform, tensors, f"a dictionary with {names}")
    return {name: _require_shape_of(statistics.largest, transform, tensor) for name, tensor in tensors.items()}


def _require_shape_of(expected: Tensor, transform: Transform, result: object) -> Tensor:
    """Returns a result of a transform, if it is a tensor with the expected shape."""
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        shape = f"a tensor with shape {tuple(expected.shape)}"
        raise wrong_result(f"The transform '{transform.name}'", transform, result, shape)
    return result
