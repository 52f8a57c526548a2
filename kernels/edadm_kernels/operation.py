"""Registers the operations of the namespace `edadm`: schema, kernel, reference and shapes of each in a single place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from edadm_kernels.backend import uses_kernel

Function = TypeVar("Function", bound=Callable[..., Any])


def operation(
    name: str, *, empty: Callable[..., Any], reference: Callable[..., Any] | None = None
) -> Callable[[Function], Function]:
    """Returns a decorator that registers a function as the torch operation `edadm::name`.

    The decorated function computes the operation by a kernel, its signature is the schema, and its docstring describes
    the operation. The operation takes the function's place, so it is called like the function, and torch.compile and
    CUDA graphs treat it as one node. Eager calls on a GPU that record no gradients and no profile bypass torch's
    dispatcher, which takes longer than many kernels. Where the first argument and the outputs have no elements, as for
    a batch of zero samples, neither a kernel nor the reference runs.

    Args:
        name: The name of the operation.
        empty: A function with the same parameters and defaults. It checks the arguments and returns the outputs before
            they have values; torch calls it while it traces.
        reference: A function with the same parameters and defaults that returns the exact outputs. It runs where no
            kernel does; with `None` the decorated function runs everywhere.
    """

    def register(function: Function) -> Function:
        def compute(*arguments: Any, **named: Any) -> Any:
            if not arguments[0].numel():
                outputs = empty(*arguments, **named)
                if not any(output.numel() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)):
                    return outputs
            if reference is None or uses_kernel(arguments[0]):
                return function(*arguments, **named)
            return _fill(empty(*arguments, **named), reference(*arguments, **named))

        schema = torch.library.infer_schema(function, mutates_args=())
        registered = torch.library.custom_op(f"edadm::{name}", compute, mutates_args=(), schema=schema)
        registered.register_fake(empty)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if arguments and _is_eager(arguments[0]):
                return compute(*arguments, **named)
            return registered(*arguments, **named)

        return cast(Function, call)

    return register


def _is_eager(x: Any) -> bool:
    """Returns whether a call with the first argument `x` is on a GPU, and neither traced nor part of a gradient."""
    return type(x) is Tensor and x.is_cuda and _is_unobserved()


def _is_unobserved() -> bool:
    """Returns whether no compiler, gradient, profiler or mode of torch's dispatcher follows what is computed."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.autograd._profiler_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _fill(outputs: Tensor | list[Tensor], values: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Returns `outputs` with `values` copied into them: an operation may not return a view of its input."""
    if isinstance(outputs, Tensor):
        assert isinstance(values, Tensor)
        return outputs.copy_(values)
    return [output.copy_(value) for output, value in zip(outputs, values, strict=True)]
