r"""float8 products of cuBLAS, as torch calls them: what 8-bit floating point reaches without special kernels.

$$ y = s_x s_w \, (x / s_x)_\text{e4m3} \cdot (w / s_w)_\text{e4m3}^\top + b, \qquad s = \max |\cdot| / 448 $$

with one static scale per tensor. The scale of the input comes from the calls that are timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import load_tensors, save_tensors
from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.torch_peer import FLOAT8, has_float8, torch_spec
from edadm_cli.bench.spec import Spec
from edadm_cli.errors import MachineError
from edadm_cli.hooks import Hooks

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_MULTIPLE = 16
"""cuBLAS multiplies float8 matrices whose sides are multiples of this."""


class Float8(Contender):
    """Linear layers as `torch._scaled_mm` with static scales; everything else in half precision."""

    name = FLOAT8

    def require(self, device: torch.device) -> None:
        """Refuses a device that does not multiply float8."""
        if not has_float8(device):
            raise MachineError(
                "--against float8 needs a GPU of compute capability 8.9 or later; "
                + ("this bench runs on the CPU." if device.type != "cuda" else "this GPU is older."),
                hint="--against torchao",
            )

    def prepare(self, context: Preparation) -> list[Spec]:
        """Measures the largest input of each linear layer over the calls."""
        folder = context.folder(self.name)
        folder.mkdir(parents=True)
        path = folder / "input_max.safetensors"
        save_tensors(path, input_maxima(context))
        return [
            replace(torch_spec(self.name, context, FLOAT8, context.facts.linear_weights), name=FLOAT8, settings=path)
        ]

    def quantized(self, denoiser: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
        """Replaces the linear layers whose sizes float8 products allow."""
        assert spec.settings is not None
        nn.Module.to(denoiser, device)
        for name, largest in load_tensors(spec.settings).items():
            layer = denoiser.get_submodule(name)
            if isinstance(layer, nn.Linear) and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE):
                denoiser.set_submodule(name, Float8Linear(layer, float(largest)))
        return denoiser


class Float8Linear(nn.Module):
    """A linear layer that multiplies in float8.

    Args:
        layer: The layer at full precision.
        input_max: Largest absolute value of its input.
    """

    def __init__(self, layer: nn.Linear, input_max: float) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.float().abs().amax().clamp(min=1e-12) / _LARGEST
        device = weight.device
        self.register_buffer("weight", (weight.float() / scale).to(torch.float8_e4m3fn))  # [N, K]
        self.register_buffer("weight_scale", scale.to(device))
        self.register_buffer("input_scale", torch.tensor(max(input_max, 1e-12) / _LARGEST, device=device))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, in the element type of `x`, whose shape is `(*, K)`."""
        rows = x.reshape(-1, x.shape[-1]).float() / self.get_buffer("input_scale")
        codes = rows.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        y: Tensor = torch._scaled_mm(
            codes,
            self.get_buffer("weight").t(),
            scale_a=self.get_buffer("input_scale"),
            scale_b=self.get_buffer("weight_scale"),
            out_dtype=x.dtype,
        )
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


@torch.no_grad()
def input_maxima(context: Preparation) -> dict[str, Tensor]:
    """Returns the largest absolute input of each linear layer over the calls, by name."""
    maxima: dict[str, Tensor] = {}
    denoiser = context.denoiser()

    def observe(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().amax().float().reshape(1)
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return hook

    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    with Hooks() as hooks:
        for name, layer in layers.items():
            hooks.before(layer, observe(name))
        for args, kwargs in context.calls:
            denoiser(*args, **kwargs)
    return maxima
