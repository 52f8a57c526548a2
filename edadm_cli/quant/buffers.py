"""Lets modules be cast while their own buffers, such as scales, stay in float32."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def keeping_float32(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a function for `Module._apply` so that the module's own float32 buffers change device but not dtype."""
    owned = {id(buffer) for buffer in module.buffers(recurse=False)}

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) in owned and result.dtype != tensor.dtype:
            return tensor.to(device=result.device)
        return result

    return moved
