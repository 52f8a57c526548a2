"""Measures the time of each kernel on CUDA, or operation on a CPU, in a step, under the name of its layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from edadm_cli.engines.base import LayerExecution, OperationTime
from edadm_cli.engines.cuda.products.product import AND, Product
from edadm_cli.quant.layers import QuantizedLayer

_PREFIX = "layer:"
_KINDS = (
    ("attention", ("flash", "attention", "fmha", "sdpa", "softmax")),
    ("norm", ("norm", "group_", "layer_rows")),
    ("conv2d", ("conv", "fprop")),
    # `product` and `join_kernel` serve convolutions too; those have a layer's name, and so its kind
    (
        "linear",
        (
            "gemm",
            "linear",
            "addmm",
            "matmul",
            "bmm",
            "nvjet",
            "cutlass",
            "product",
            "join_kernel",
            "matrices",
            "few_rows",
        ),
    ),
    ("reorder", ("copy", "cat", "transpose", "nchw", "nhwc", "memcpy", "memset", "index")),
)


def operation_times(
    model: nn.Module, step: Callable[[], Any], layers: tuple[LayerExecution, ...], device: torch.device
) -> list[OperationTime]:
    """Returns the time of every operation of one `step`, in execution order.

    Args:
        model: The model, whose products are named in the profile.
        step: A function that runs the model once, kernel by kernel, since the replay of a graph has no layer names.
        layers: How the layers run.
        device: The device of the model.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    eager = torch.compiler.set_stance("force_eager")  # a compiled block has no layer names
    with eager, wrapped_products(model, _recorded), profile(activities=activities) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize(device)
    executions = {layer.name: layer for layer in layers}
    events = sorted((e for e in profiler.events() if not e.is_async), key=lambda event: event.time_range.start)
    times = []
    for event in events:
        layer = executions.get(_layer_of(event).split(AND)[0])
        for name, microseconds in _work_of(event, on_cuda):
            of_layer = layer if _is_product(name) else None
            kind = _kind(name) if of_layer is None else of_layer.kind
            precision = "float" if of_layer is None else of_layer.precision
            label = name if layer is None else f"{layer.name}: {name}"
            times.append(OperationTime(label, kind, precision, microseconds / 1000))
    return times


@contextmanager
def wrapped_products(
    model: nn.Module, wrap: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]]
) -> Iterator[None]:
    """Returns a context in which every product of a model is replaced with `wrap(layer name, product)`."""
    products = [module for module in model.modules() if isinstance(module, Product) and module.label]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    for module in products:
        module.product = wrap(module.label, module.product)  # type: ignore[method-assign]
    for name, layer in layers.items():
        layer.forward = wrap(name, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in products:
            del module.product
        for layer in layers.values():
            del layer.forward


def _recorded(label: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with record_function(_PREFIX + label):
            return function(*args, **kwargs)

    return run


def _layer_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name.removeprefix(_PREFIX))
        event = event.cpu_parent
    return ""


def _work_of(event: Any, on_cuda: bool) -> list[tuple[str, float]]:
    """Returns an operation's kernels with microseconds; on a CPU, the operation without those that it calls."""
    if on_cuda:
        return [(kernel.name, kernel.duration) for kernel in event.kernels]
    is_work = not event.name.startswith(_PREFIX) and event.self_cpu_time_total > 0
    return [(event.name, event.self_cpu_time_total)] if is_work else []


def _is_product(name: str) -> bool:
    return _kind(name) in ("linear", "conv2d")


def _kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, words in _KINDS if any(word in lowered for word in words)), "elementwise")
