"""SDNQ, the quantizer of SD.Next: INT8 weights and dynamic INT8 activations, with convolutions too."""

from __future__ import annotations

import torch
from torch import nn

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.torch_peer import torch_spec
from edadm_cli.bench.spec import Spec

_CONVOLUTIONS = "convolutions"
_MANY = 8
"""Convolutions from which a denoiser counts as a UNet: transformers have one or two at their ends."""


class Sdnq(Contender):
    """`sdnq_post_load_quant` with quantized products."""

    name = "sdnq"
    packages = ("sdnq",)

    def prepare(self, context: Preparation) -> list[Spec]:
        """Returns the form with linear layers, and for UNets the form with convolutions too."""
        specs = [torch_spec(self.name, context, "w8a8", context.facts.linear_weights)]
        if context.facts.num_convolutions >= _MANY:
            num_weights = context.facts.linear_weights + context.facts.convolution_weights
            specs.append(torch_spec(self.name, context, "w8a8", num_weights, _CONVOLUTIONS))
        return specs

    def quantized(self, denoiser: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
        """Replaces the layers, on the device."""
        from sdnq import sdnq_post_load_quant

        with_convolutions = spec.variant == _CONVOLUTIONS
        quantized: nn.Module = sdnq_post_load_quant(
            nn.Module.to(denoiser, device),
            weights_dtype="int8",
            use_quantized_matmul=True,
            quant_conv=with_convolutions,
            use_quantized_matmul_conv=with_convolutions,
            torch_dtype=getattr(torch, spec.dtype),
        )
        return quantized
