"""torchao: linear layers with dynamic activations, compiled by torch; INT8 anywhere, float8 on newer GPUs."""

from __future__ import annotations

import torch
from torch import nn

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.torch_peer import FLOAT8, has_float8, torch_spec
from edadm_cli.bench.spec import Spec


class TorchAo(Contender):
    """`quantize_` of torchao with its configurations for 8-bit weights and activations."""

    name = "torchao"
    packages = ("torchao",)

    def prepare(self, context: Preparation) -> list[Spec]:
        """Returns the INT8 form, and the float8 form where the GPU multiplies float8."""
        widths = ["w8a8", *([FLOAT8] if has_float8(context.device) else [])]
        return [torch_spec(self.name, context, bits, context.facts.linear_weights) for bits in widths]

    def quantized(self, denoiser: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
        """Replaces the linear layers, on the device."""
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        is_float8 = spec.bits == FLOAT8
        config = Float8DynamicActivationFloat8WeightConfig() if is_float8 else Int8DynamicActivationInt8WeightConfig()
        quantize_(nn.Module.to(denoiser, device), config)
        return denoiser
