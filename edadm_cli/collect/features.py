"""Records the mid-block feature of a denoiser: the input of the middle of the network at a step.

References:
    EDA-DM, arXiv 2401.04585, section 4.1 (features at the input of the mid-block's attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from edadm_cli.hooks import Hooks
from edadm_cli.models.families import middle_module


@contextmanager
def record_features(denoiser: nn.Module, on_feature: Callable[[Tensor], None]) -> Iterator[None]:
    """Passes the mid-block feature of each call to `on_feature`, with shape `(R, C, *)`: channels before positions."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feature = _feature(args, kwargs).detach()
        on_feature(feature.transpose(1, 2) if feature.ndim == 3 else feature)

    with Hooks() as hooks:
        hooks.before(middle_module(denoiser), hook, with_kwargs=True)
        yield


def _feature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the tensor that a block works on: its first argument, or the one that diffusers calls hidden states."""
    values = [*args, *(kwargs[name] for name in ("hidden_states",) if name in kwargs), *kwargs.values()]
    return next(value for value in values if isinstance(value, Tensor) and value.ndim >= 3)
