"""Lists every layer of a quantized denoiser with the way it runs, for any engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from edadm_cli.engines.base import FLOAT, LayerExecution
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.plan import AttentionPlan, LayerPlan

Decision = Callable[[str, nn.Module], tuple[str, str | None]]
"""A function that takes the name and module of a layer that is planned as integers; for attention, its processor.

It returns the precision that the layer runs in, and the reason if it does not run in integers.
"""


def planned(plan: LayerPlan | AttentionPlan) -> str:
    """Returns the bits of a plan, such as `w4a8`, or `float` for a layer whose input is not quantized."""
    if isinstance(plan, AttentionPlan):
        return f"w{plan.activation_bits}a{plan.probability_bits}"
    return FLOAT if plan.activation_bits is None else plan.width


def list_layers(denoiser: nn.Module, rest_dtype: torch.dtype, decide: Decision) -> tuple[LayerExecution, ...]:
    """Returns how every convolution, linear layer and attention of a denoiser runs, in the order of its modules.

    Args:
        denoiser: A denoiser with quantized layers.
        rest_dtype: The element type of what is not quantized.
        decide: Returns how the engine runs a layer that is planned as integers.
    """
    rows, rest = [], str(rest_dtype).removeprefix("torch.")
    for name, module in denoiser.named_modules():
        product = _kind_and_plan(module)
        if product is None:
            continue
        kind, plan, subject = product
        bits = FLOAT if plan is None else planned(plan)
        precision, reason = (rest, None) if bits == FLOAT else decide(name, subject)
        rows.append(LayerExecution(name, kind, bits, precision, reason))
    return tuple(rows)


def _kind_and_plan(
    module: nn.Module,
) -> tuple[Literal["conv2d", "linear", "attention"], LayerPlan | AttentionPlan | None, nn.Module] | None:
    if isinstance(module, QuantizedLayer):
        return module.operation.kind, module.plan, module
    if isinstance(module, nn.Conv2d):
        return "conv2d", None, module
    if isinstance(module, nn.Linear):
        return "linear", None, module
    processor = getattr(module, "processor", None)
    if isinstance(processor, QuantizedAttention):
        return "attention", processor.plan, processor
    return ("attention", None, module) if processor is not None else None
