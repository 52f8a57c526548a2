"""The mid-block feature map of a denoiser: what enters the middle of the network at a step.

References:
    EDA-DM, arXiv 2401.04585, section 4.1 (features at the input of the mid-block's attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from edadm_cli.errors import InputError

_BLOCK_LISTS = ("transformer_blocks", "blocks", "layers")


def middle_module(denoiser: nn.Module) -> nn.Module:
    """The module whose input is the mid-block feature.

    For a UNet: the mid-block's attention; without one, its second residual block; without a mid-block, the
    last block of the down path. For a transformer: the middle one of its blocks.

    Raises:
        InputError: The network has none of these.
    """
    for name in _BLOCK_LISTS:
        blocks = getattr(denoiser, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
            return blocks[len(blocks) // 2]
    middle = getattr(denoiser, "mid_block", None)
    candidates: list[Any] = [
        *list(getattr(middle, "attentions", None) or [])[:1],
        *list(getattr(middle, "resnets", None) or [])[1:2],
        middle,
        *list(getattr(denoiser, "down_blocks", None) or [])[-1:],
    ]
    found = next((module for module in candidates if isinstance(module, nn.Module)), None)
    if found is None:
        raise InputError(
            f"{type(denoiser).__name__} has neither a mid-block nor a list of transformer blocks, "
            "so there is no feature map to tell its steps apart."
        )
    return found


@contextmanager
def record_features(denoiser: nn.Module, on_feature: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand the mid-block feature of each call to `on_feature`, as `(R, C, H, W)` or `(R, C, L)`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feature = args[0] if args else kwargs["hidden_states"]
        on_feature(feature.detach().transpose(1, 2) if feature.ndim == 3 else feature.detach())

    handle = middle_module(denoiser).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
