"""The numbers of bits that a layer is measured at, and how each of them changes the layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.gptq import gptq_params
from edadm_cli.calibrate.nearest import nearest_codes
from edadm_cli.calibrate.ranges import search_activation_ranges, search_weight_scales
from edadm_cli.calibrate.transforming import input_quantizer
from edadm_cli.config import SensitivityConfig
from edadm_cli.models.families import Call
from edadm_cli.models.units import Trace
from edadm_cli.quant.inputs import InputQuantizer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.recipe import RangeRecipe

_REFERENCE_BITS = 4


@dataclass(frozen=True)
class LayerCandidates:
    """The candidates of one layer: bits of its weight, the input in float, and bits of its input, the weight in float.

    Attributes:
        layer: The layer at full precision.
        weight_bits: Bits of the weight with one scale per output channel.
        grouped_bits: Bits of the weight in groups.
        activation_bits: Bits of the input; empty where it stays in float.
        gptq_bits: Bits of the weight if GPTQ rounds it, one number or none; all others are rounded to nearest.
        weight_changes: The rounded weight minus the weight, for `weight_bits`, `grouped_bits` and `gptq_bits`, with
            shape `(B, C_out, ...)`.
        plan: The layer's plan, which says how its input is split into channel parts.
        input_quantizers: The quantizer of each channel part of the input, for each number of `activation_bits`.
    """

    layer: nn.Module
    weight_bits: tuple[int, ...]
    grouped_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    gptq_bits: tuple[int, ...]
    weight_changes: Tensor
    plan: LayerPlan
    input_quantizers: tuple[tuple[InputQuantizer, ...], ...]

    @property
    def count(self) -> int:
        """The number of candidates."""
        return len(self.weight_changes) + len(self.activation_bits)

    @torch.no_grad()
    def output_changes(self, x: Tensor) -> Tensor:
        """Returns how each candidate changes the layer's output for the input `x`.

        Returns:
            The changes, with shape `(n, count, M)` for an output of n rows with M values each: those of `weight_bits`
            come first, then those of `grouped_bits`, `gptq_bits` and `activation_bits`.
        """
        operation, x = Operation.of(self.layer), x.detach()
        changes = [self._changes_by_weights(operation, x)]
        if self.activation_bits:
            weight, dim = self.layer.get_parameter("weight"), operation.channel_dim
            for quantizers in self.input_quantizers:
                pieces = zip(quantizers, self.plan.split(x, dim), strict=True)
                rounded = torch.cat([quantizer.fake_quantize(piece) for quantizer, piece in pieces], dim)
                changes.append(operation(rounded - x, weight).flatten(1).unsqueeze(1))
        return torch.cat(changes, 1)

    def _changes_by_weights(self, operation: Operation, x: Tensor) -> Tensor:
        """Returns the changes by the weights, `[n, B, M]`, from one product where that is possible."""
        weights = self.weight_changes
        if operation.groups != 1:
            return torch.stack([operation(x, weight).flatten(1) for weight in weights], 1)
        y = operation(x, weights.flatten(0, 1))  # [n, B * C_out, H, W] or [n, ..., B * C_out]
        if operation.kind == "linear":
            y = y.unflatten(-1, weights.shape[:2]).movedim(-2, 1)
        return y.reshape(len(x), len(weights), -1)


def layer_candidates(
    config: SensitivityConfig,
    denoiser: nn.Module,
    traced: Trace,
    full: Mapping[str, LayerPlan],
    calls: list[Call],
) -> dict[str, LayerCandidates]:
    """Returns the candidates of each layer, in the order of execution: searched ranges, nearest rounding.

    Args:
        config: The numbers of bits, and the recipe.
        denoiser: The denoiser at full precision.
        traced: Its trace.
        full: The plan of each layer that the recipe quantizes.
        calls: Arguments of the denoiser, by which ranges of inputs are searched.

    Raises:
        InputError: A weight or an activation is not finite.
    """
    ranges = _ranges(config)
    weights: dict[str, list[Tensor]] = {name: [] for name in full}
    widths = [*((bits, None) for bits in config.weight_bits), *((b, config.group_size) for b in config.grouped_bits)]
    for bits, size in widths:
        layers = {
            name: LayerPlan(weight_bits=bits, group_size=size, channel_parts=plan.channel_parts)
            for name, plan in full.items()
        }
        scales = search_weight_scales(traced, QuantizationPlan(layers=layers), ranges)
        for name, plan in layers.items():
            weight = denoiser.get_submodule(name).get_parameter("weight").detach()
            weights[name].append(weight_change(weight, name, plan, scales))
    by_gptq = _gptq_changes(config, denoiser, traced, full, calls)
    for name, change in by_gptq.items():
        weights[name].append(change)
    quantized = {name: plan for name, plan in full.items() if plan.input_grid is not None}
    inputs: dict[str, list[tuple[InputQuantizer, ...]]] = {name: [] for name in full}
    for bits in config.activation_bits:
        layers = {
            name: plan.model_copy(update={"activation_bits": bits, "transform": None})
            for name, plan in quantized.items()
        }
        found = search_activation_ranges(denoiser, traced, QuantizationPlan(layers=layers), ranges, calls)
        for name, plan in layers.items():
            inputs[name].append(_input_quantizers(denoiser.get_submodule(name), name, plan, found))
    return {
        name: LayerCandidates(
            denoiser.get_submodule(name),
            config.weight_bits,
            config.grouped_bits,
            config.activation_bits if name in quantized else (),
            (reference_bits(config),) if name in by_gptq else (),
            torch.stack(weights.pop(name)),
            plan,
            tuple(inputs[name]),
        )
        for name, plan in full.items()
    }


def reference_bits(config: SensitivityConfig) -> int:
    """Returns the number of bits at which nearest rounding and GPTQ are compared: the closest to four."""
    return min(config.weight_bits, key=lambda bits: (abs(bits - _REFERENCE_BITS), bits))


def _gptq_changes(
    config: SensitivityConfig, denoiser: nn.Module, traced: Trace, full: Mapping[str, LayerPlan], calls: list[Call]
) -> dict[str, Tensor]:
    """Returns the changes of the weights that GPTQ rounds by inputs at full precision; none where it does not apply.

    These are the layers with one group, if the recipe learns rounding or rounds by GPTQ.
    """
    if config.recipe.rounding != "gptq" and config.recipe.learn.granularity == "none":
        return {}
    layers = {
        name: LayerPlan(weight_bits=reference_bits(config), channel_parts=plan.channel_parts)
        for name, plan in full.items()
        if Operation.of(denoiser.get_submodule(name)).groups == 1
    }
    plan, changes = QuantizationPlan(layers=layers), dict[str, Tensor]()
    params = gptq_params(denoiser, traced, plan, search_weight_scales(traced, plan, _ranges(config)), calls)
    for name, layer in layers.items():
        weight = denoiser.get_submodule(name).get_parameter("weight").detach()
        parts = [(params[f"{part}.weight_int"], params[f"{part}.weight_scale"]) for part in layer.part_names(name)]
        rounded = [codes * scale.reshape(-1, *[1] * (weight.dim() - 1)) for codes, scale in parts]
        changes[name] = torch.cat(rounded, 1).to(weight) - weight
    return changes


def _ranges(config: SensitivityConfig) -> RangeRecipe:
    """Returns how ranges are searched: statistics of a whole plan's inputs do not belong to single layers."""
    ranges = config.recipe.ranges
    return ranges.model_copy(update={"weight": "search"}) if ranges.weight == "output-error" else ranges


def weight_change(weight: Tensor, name: str, plan: LayerPlan, scales: Mapping[str, Tensor]) -> Tensor:
    """Returns the weight rounded to nearest minus the weight.

    Args:
        weight: The weight, with shape `(C_out, ...)`.
        name: Name of the layer.
        plan: The layer's bits.
        scales: The scales that `search_weight_scales` returns.
    """
    rounded = []
    for part, piece in zip(plan.part_names(name), plan.split(weight), strict=True):
        scale = scales[f"{part}.weight_scale"].to(weight.device)
        codes = nearest_codes(piece, scale, plan, scales.get(f"{part}.weight_multiplier"))
        rounded.append(codes * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    return torch.cat(rounded, 1) - weight


def _input_quantizers(
    layer: nn.Module, name: str, plan: LayerPlan, ranges: Mapping[str, Tensor]
) -> tuple[InputQuantizer, ...]:
    """Returns the quantizer of each channel part of a layer's input, on the device of its weight."""
    operation, device = Operation.of(layer), layer.get_parameter("weight").device
    quantizers = (input_quantizer(part, plan, operation, ranges) for part in plan.part_names(name))
    return tuple(quantizer.to(device) for quantizer in quantizers if quantizer is not None)
