"""Forward hooks that are removed at the end of a `with` block, whatever happens in it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Hooks(ExitStack):
    """Hooks of any number of modules, for the duration of a `with` block.

    with Hooks() as hooks:
        hooks.after(layer, lambda module, args, output: outputs.append(output))
        denoiser(*args)
    """

    def before(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Calls `hook(module, args)` before each call of a module, or `hook(module, args, kwargs)` if `with_kwargs`."""
        self.callback(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Calls `hook(module, args, output)` after each call, or `hook(module, args, kwargs, output)` if `with_kwargs`.

        The output of a call is what the hook returns, if that is not `None`.
        """
        self.callback(module.register_forward_hook(hook, with_kwargs=with_kwargs).remove)
