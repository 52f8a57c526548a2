r"""Fuses LoRA adapters into a pipeline before it is packed, with the calibration of the pipeline without them.

Activation ranges and corrected biases do not change. The codes c of a weight W that becomes W' are computed again, with
the same scale s:

    c' = round(W' / s) + (c - round(W / s))   where |c' - W' / s| < 1,   else   round(W' / s),

clamped to the grid. A weight thus keeps the direction of rounding that was learned, as long as the code is still one of
its two neighbours. Keeping c wherever W' is in the same step as W would lose the adapter: most of its changes are
smaller than a step of four bits, and it acts through the share of weights that it moves to another code.

An output channel with weights that are now more than one step outside the grid gets a larger scale, by the factor
max |W'| / max |W|, and its weights are rounded to nearest. If all weights W of the channel are zero to within one step,
the larger scale is the one with which the grid ends at max |W'|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_codes
from edadm_cli.calibrate.transforming import folded
from edadm_cli.errors import UsageError
from edadm_cli.integrations.lora import load_lora_file, require_safetensors
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.quant.groups import codes_of, per_weight
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan

_LARGEST_WEIGHT = 100


@dataclass(frozen=True)
class LoraFile:
    """One adapter file and its weight.

    Attributes:
        path: A safetensors file.
        weight: Factor of the adapter's change.
    """

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Reads `FILE` or `FILE:WEIGHT`.

        Raises:
            UsageError: The weight is not a number, or it is too large.
            InputError: There is no such safetensors file.
        """
        path, colon, number = text.rpartition(":")
        file, weight = Path(text), 1.0
        if colon and not file.is_file():
            file = Path(path)
            weight = _weight(number)
            if math.isnan(weight) and not file.is_file():
                file = Path(text)  # what is behind the colon is a part of the name
        require_safetensors(file)
        if not abs(weight) <= _LARGEST_WEIGHT:
            raise UsageError(
                f"--lora {text}: the weight of an adapter is a number from -{_LARGEST_WEIGHT} to {_LARGEST_WEIGHT}.",
                hint=f"--lora {file}:0.8",
            )
        return cls(file, weight)

    def identity(self) -> dict[str, Any]:
        """Returns what decides the fused weights: the hash of the file and the weight."""
        return {"sha256": sha256(self.path.read_bytes()).hexdigest(), "weight": self.weight}


@dataclass
class Fused:
    """The changes made by fusing.

    Attributes:
        before: The weights of the denoiser's adapted layers before fusing, by name.
        components: Names of other components that have changed, such as text encoders.
        changed_codes: Share of the codes of adapted layers that have changed.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    components: set[str] = field(default_factory=set)
    changed_codes: float = 0.0


def fuse(model: LoadedModel, files: Sequence[LoraFile]) -> Fused:
    """Adds adapters to the weights of a full-precision pipeline, in place.

    Returns:
        The layers and components that changed. Its `changed_codes` is 0 until `refit` sets it.

    Raises:
        InputError: A file is not a LoRA, or it belongs to another model.
        UsageError: The pipeline takes no LoRA, or PEFT is not installed.
    """
    pipeline: Any = model.pipeline
    if files:
        hint = "fuse the adapter into the full-precision pipeline, then quantize that"
        model.require_one_denoiser("--lora", hint)
    fused = Fused()
    for number, file in enumerate(files):
        adapter = f"adapter{number}"
        load_lora_file(pipeline, file.path, adapter)
        networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        adapted = {name: layers for name, part in networks.items() if (layers := _adapted_layers(part))}
        for layer, base in adapted.get(model.denoiser_name, {}).items():
            fused.before.setdefault(layer, base.get_parameter("weight").detach().clone())
        fused.components |= adapted.keys() - {model.denoiser_name}
        pipeline.set_adapters([adapter], adapter_weights=[file.weight])
        pipeline.fuse_lora(components=sorted(adapted), adapter_names=[adapter])
        pipeline.unload_lora_weights()
    for name in (model.denoiser_name, *fused.components):
        getattr(pipeline, name).requires_grad_(False)
    return fused


def refit(denoiser: nn.Module, plan: QuantizationPlan, params: Mapping[str, Tensor], fused: Fused) -> dict[str, Tensor]:
    """Returns the quantization parameters for fused weights, with new codes for the layers that changed (see above).

    Args:
        denoiser: The full-precision denoiser with fused weights.
        plan: The bits of every layer.
        params: The parameters that were reconstructed for the weights before fusing.
        fused: The result of `fuse`, whose `changed_codes` is set.
    """
    result, changed, total = dict(params), 0, 0
    for name in fused.before.keys() & plan.layers.keys():
        layer = plan.layers[name]
        weight = denoiser.get_submodule(name).get_parameter("weight").detach()
        pieces = zip(layer.part_names(name), layer.split(fused.before[name]), layer.split(weight), strict=True)
        for part, old, new in pieces:
            scale, codes = params[f"{part}.weight_scale"], params[f"{part}.weight_int"]
            old, new = (folded(piece.cpu(), part, layer, params) for piece in (old, new))
            multipliers = params.get(f"{part}.weight_multiplier")
            moved, widened = moved_codes(codes, old, new, scale, layer, multipliers)
            result[f"{part}.weight_int"], result[f"{part}.weight_scale"] = moved, widened
            changed, total = changed + int((moved != codes).sum()), total + moved.numel()
    fused.changed_codes = changed / max(total, 1)
    return result


def moved_codes(
    codes: Tensor, old: Tensor, new: Tensor, scale: Tensor, layer: LayerPlan, multipliers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the codes of a weight that changed, and the scale of each output channel.

    With groups, c and W are divided by the multipliers first, and the result is multiplied by them.

    Args:
        codes: The integers of `old`, int8, learned or rounded to nearest.
        old: The weight before fusing, `[C_out, ...]`.
        new: The weight after fusing, in the shape of `old`.
        scale: The scale of each output channel, `[C_out]`.
        layer: The bits of the layer.
        multipliers: The multiplier of each group, `[C_out, num_groups]`, where there are groups.
    """
    if layer.group_size is not None:
        assert multipliers is not None
        factors = per_weight(multipliers, tuple(new.shape), layer.group_size)
        ungrouped = layer.model_copy(update={"group_size": None})
        moved, scale = moved_codes(
            codes_of(codes, multipliers, layer.group_size), old / factors, new / factors, scale, ungrouped
        )
        return moved * factors, scale
    grid = layer.weight_grid
    before, after = (x.flatten(1).abs().amax(dim=1) for x in (old, new))
    excess = (after - torch.maximum(before, -grid.quant_min * scale)) / scale
    widens = excess > 1
    wider = torch.where(before > scale, scale * after / before, after / grid.quant_max)
    scale = torch.where(widens, wider, scale)
    position = new / scale.reshape(-1, *[1] * (new.ndim - 1))
    nearest = nearest_codes(new, scale, layer)
    kept = nearest.int() + codes.int() - nearest_codes(old, scale, layer).int()
    still_holds = ((kept - position).abs() < 1) & ~widens.reshape(-1, *[1] * (new.ndim - 1))
    moved = torch.where(still_holds, kept, nearest.int()).clamp(grid.quant_min, grid.quant_max).to(torch.int8)
    return moved, scale


def _adapted_layers(component: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that an adapter wraps, by name."""
    layers: dict[str, nn.Module] = {}
    for name, module in component.named_modules():
        base = getattr(module, "base_layer", None)
        if hasattr(module, "lora_A") and isinstance(base, nn.Module):
            layers[name] = base
    return layers


def _weight(text: str) -> float:
    """Returns the number that a text stands for; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
