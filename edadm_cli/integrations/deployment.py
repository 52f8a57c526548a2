"""Makes a denoiser that diffusers has loaded ready to run: its methods, the product of its codes, and CUDA graphs."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from edadm_cli.integrations.methods import bind_methods
from edadm_cli.integrations.notices import say_once
from edadm_cli.quant.layers import LayerProduct
from edadm_cli.quant.network import deploy


def make_ready(model: nn.Module) -> None:
    """Prepares a denoiser whose weights have just been loaded, in place; it may be moved to a GPU before or after."""
    bind_methods(model)
    product = layer_product()
    deploy(model, product)
    if product is not None and torch.cuda.is_available():
        from edadm_cli.engines.cuda.recording import record_calls

        record_calls(model)


def layer_product() -> LayerProduct | None:
    """Returns the product that the layers of all loaded exports share; `None` if Triton is not installed."""
    try:
        product, on_cpu = _kernel_product()
    except ImportError as error:
        say_once(f"Exported denoisers compute in floating point here: the package '{error.name}' is not installed.")
        return None
    if not torch.cuda.is_available():
        say_once(on_cpu)
    return product


@cache
def _kernel_product() -> tuple[LayerProduct, str]:
    from edadm_cli.engines.cuda.compiled.layer_product import ON_CPU, KernelProduct

    return KernelProduct(), ON_CPU
