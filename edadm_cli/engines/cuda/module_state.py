"""Tells whether the modules of a network are as they were: its parts, attributes, hooks, and places of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule

_OF_TORCH = frozenset(nn.Module().__dict__)
_END = object()


class ModuleState:
    """Remembers what the result of a network depends on besides its inputs and the values of its tensors.

    These are the modules, their attributes, the items of attributes that are dictionaries or lists (such as the weights
    of LoRA), the attributes of attention processors, hooks, and the addresses of parameters and buffers. What lies
    deeper is not seen.

    Args:
        model: The network.

    Attributes:
        is_special: Whether a module is hooked, offloaded or compiled, so that a call may not do what its class says.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._views = list(chain.from_iterable(map(_views, modules)))
        self._items = [*chain.from_iterable(self._views), _END]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
        self._addresses = self._current_addresses()
        self.is_special = any(map(_is_special, modules))

    def is_unchanged(self) -> bool:
        """Returns whether the network still is as it was."""
        items = chain(chain.from_iterable(self._views), (_END,))
        return (
            not any(self._hooks) and all(map(is_, items, self._items)) and self._current_addresses() == self._addresses
        )

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensors in self._tensors for tensor in tensors.values() if tensor is not None]


def is_special(model: nn.Module) -> bool:
    """Returns whether a module of a network is hooked, offloaded or compiled."""
    return any(map(_is_special, model.modules()))


def _is_special(module: nn.Module) -> bool:
    attributes = module.__dict__
    registry = attributes.get("_diffusers_hook")  # it stays when its hooks are gone, and some pipelines create it empty
    return (
        bool(module._forward_hooks or module._forward_pre_hooks)
        or "_hf_hook" in attributes
        or (registry is not None and bool(getattr(registry, "hooks", True)))
        or isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
    )


def _views(module: nn.Module) -> Iterator[Iterable[Any]]:
    """Yields views of a module's attributes and parts, and of the dictionaries and lists among its attributes."""
    yield module.__dict__.values()
    yield module._modules.values()
    for name, value in module.__dict__.items():
        if name in _OF_TORCH:
            continue
        if isinstance(value, dict):
            yield value.values()
        elif isinstance(value, list):
            yield value
        elif name == "processor" and not isinstance(value, Tensor):
            yield getattr(value, "__dict__", {}).values()
