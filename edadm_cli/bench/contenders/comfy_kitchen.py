"""comfy-kitchen, the kernels behind ComfyUI: INT8 weights with a scale per row, and dynamic INT8 activations."""

from __future__ import annotations

import torch
from torch import nn

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.torch_peer import torch_spec
from edadm_cli.bench.spec import Spec
from edadm_cli.errors import UsageError

_LAYOUT = "TensorWiseINT8Layout"


class ComfyKitchen(Contender):
    """Linear layers whose weights are tensors of comfy-kitchen; convolutions stay in floating point, as in ComfyUI."""

    name = "comfy-kitchen"
    packages = ("comfy_kitchen",)

    def require(self, device: torch.device) -> None:
        """Refuses a CPU, for which comfy-kitchen has no kernels."""
        super().require(device)
        if device.type != "cuda":
            raise UsageError(
                "--against comfy-kitchen compares on a GPU, because its INT8 kernels are for CUDA; this bench runs on"
                " the CPU.",
                hint="--against nncf, or --device cuda",
            )

    def prepare(self, context: Preparation) -> list[Spec]:
        """Returns the INT8 form."""
        return [torch_spec(self.name, context, "w8a8", context.facts.linear_weights)]

    def quantized(self, denoiser: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
        """Replaces the weights of the linear layers, on the device."""
        from comfy_kitchen.tensor import QuantizedTensor

        nn.Module.to(denoiser, device)
        for module in denoiser.modules():
            if isinstance(module, nn.Linear):
                weight = QuantizedTensor.from_float(module.weight.detach(), _LAYOUT, per_channel=True)
                module.weight = nn.Parameter(weight, requires_grad=False)
        return denoiser
