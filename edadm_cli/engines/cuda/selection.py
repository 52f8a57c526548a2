"""Chooses the layers that float16 runs faster than integers at the size of a call, by times measured before.

Such a layer multiplies its dequantized weight codes by its input in float16, and does not quantize the input. It is
closer to full precision than the integer layer that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.cuda.fused_blocks.assembly import Assembly
from edadm_cli.engines.cuda.fused_blocks.attention import FusedAttention
from edadm_cli.engines.cuda.fused_blocks.transformer import FusedFeedForward, GatedProduct
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.norms import Normalization
from edadm_cli.engines.cuda.products.product import AND, IntegerConv2d, IntegerLinear, Product
from edadm_cli.engines.cuda.times import Matrix, MeasuredTimes, Source, SourceKind
from edadm_cli.hooks import Hooks
from edadm_kernels.tiles import Kind

GAIN = 0.1
"""The share of the int8 time that float16 must save, since kernels overlap and a step is not exactly their sum."""


@dataclass(frozen=True)
class Use:
    """Describes a product in a step.

    Attributes:
        matrix: The kind and the sizes of the product.
        source: The operation that only computes its codes; `None` if a product or attention returns the codes.
    """

    matrix: Matrix
    source: Source | None


def faster_in_float(
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    gpu: str,
    times: MeasuredTimes,
    prompt_cache: bool = True,
) -> dict[str, str]:
    """Returns the names of the layers that should run in floating point, each with the reason.

    Args:
        denoiser: A denoiser with quantized layers.
        args: The positional arguments of an example call.
        kwargs: The keyword arguments of that call.
        dtype: The element type of what is not quantized.
        gpu: The name of the GPU on which the times were measured.
        times: The measured times.
        prompt_cache: Whether keys and values of the prompt are cached; see `CudaEngine`.
    """
    meta = EngineOptions(torch.device("meta"), dtype)
    assembly = Assembly(Lowering(meta.device, dtype), prompt_cache)
    model, layers = assembly.build(denoiser)
    compiled = CudaDenoiser(model, layers, assembly.state, meta, cuda_graphs=False)
    compiled(*args, **kwargs)  # this computes the keys and values of the prompt, which do not belong to a step
    with _recorded(model) as uses:
        compiled(*args, **kwargs)
    left_in_float: dict[str, str] = {}
    for labels in _groups(model, uses):
        costs = _costs([use for label in labels for use in uses[label]], times)
        if costs is None:
            continue
        int8, half = costs
        if half < (1 - GAIN) * int8:
            together = "" if len(labels) == 1 else f", for {len(labels)} products that go together"
            reason = f"float16 is faster at this size: {half:.1f} µs against {int8:.1f} on {gpu}{together}"
            left_in_float.update({name: reason for label in labels for name in label.split(AND)})
    return left_in_float


def _costs(uses: list[Use], times: MeasuredTimes) -> tuple[float, float] | None:
    """Returns the microseconds of products and their inputs, in int8 and in float16; `None` if one is not known.

    A separate quantization adds only to the int8 time, so one that was not measured counts as zero.
    """
    products = [times.by_matrix.get(use.matrix) for use in uses]
    # each quantizes for itself, and a normalization serves all of them
    alone = [use.source for use in uses if use.source is not None and use.source[0] == "quantize"]
    shared = {use.source for use in uses if use.source is not None} - set(alone)
    times_of_uses = [*products, *(times.by_source.get(source) for source in shared)]
    times_of_uses += [times.by_source[source] for source in alone if source in times.by_source]
    known = [time for time in times_of_uses if time is not None]
    if len(known) < len(times_of_uses):
        return None
    return sum(time.int8_us for time in known), sum(time.float16_us for time in known)


def _groups(model: nn.Module, uses: dict[str, list[Use]]) -> Iterator[tuple[str, ...]]:
    """Yields the labels that are decided together, without those fused with a kernel that only gives codes."""
    taken: set[str] = set()
    for module in model.modules():
        if isinstance(module, FusedFeedForward) and module.gated is not None:
            labels: tuple[str, ...] = (module.gated.label, module.out.label)
        elif isinstance(module, FusedAttention):
            # what one normalization feeds; with a float and an integer reader it would run twice
            labels = tuple(consumer.label for consumer in module.inputs.consumers)
            if any(use.source is None for use in uses.get(module.to_out.label, [])):
                taken.add(module.to_out.label)  # its codes come out of attention's own kernel
        else:
            continue
        taken.update(labels)
        if all(label in uses for label in labels):
            yield labels
    yield from ((label,) for label in uses if label not in taken)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[Use]]]:
    """Maps labels to the uses of every integer product of a model while it is called."""
    uses: dict[str, list[Use]] = {}
    products = [m for m in model.modules() if isinstance(m, IntegerLinear | IntegerConv2d | GatedProduct) and m.label]
    pending: dict[str, Source] = {}
    norms = [module for module in model.modules() if isinstance(module, Normalization)]
    with Hooks() as hooks:
        for norm in norms:
            hooks.before(norm, _noting_norm(pending))
        for module in products:
            module.prepare = _noting_input(module, pending)  # type: ignore[method-assign]
            module.product = _noting_use(module, pending, uses)  # type: ignore[method-assign]
        try:
            yield uses
        finally:
            for module in products:
                del module.prepare, module.product


def _noting_norm(pending: dict[str, Source]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(norm, Normalization)
        if norm.is_fused:
            kind: SourceKind = "layer_norm" if norm.num_groups is None else "group_norm"
            rows, channels = _rows(inputs[0])
            channels += sum(_rows(more)[1] for more in inputs[1:])
            pending.update({consumer.label: (kind, rows, channels) for consumer in norm.consumers})

    return hook


def _noting_input(module: Product, pending: dict[str, Source]) -> Callable[..., Tensor]:
    prepare = module.prepare

    def run(x: Tensor, *more: Tensor) -> Tensor:
        rows, channels = _rows(x)
        pending[module.label] = ("quantize", rows, channels + sum(_rows(image)[1] for image in more))
        return prepare(x, *more)

    return run


def _noting_use(module: Product, pending: dict[str, Source], uses: dict[str, list[Use]]) -> Callable[..., Tensor]:
    product = module.product

    def run(prepared: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        result = product(prepared, residual, *args, **kwargs)
        use = Use((*_matrix(module, prepared, result), residual is not None), pending.pop(module.label, None))
        uses.setdefault(module.label, []).append(use)
        return result

    return run


def _matrix(module: Product, prepared: Tensor, result: Tensor) -> tuple[Kind, int, int, int]:
    rows, channels = _rows(prepared)
    if isinstance(module, IntegerConv2d):
        outputs, height, width = module.weight.shape[:3]
        return "conv", result.numel() // outputs, outputs, height * width * channels
    assert isinstance(module, IntegerLinear | GatedProduct)
    return "geglu" if isinstance(module, GatedProduct) else "linear", rows, module.weight.shape[0], channels


def _rows(x: Tensor) -> tuple[int, int]:
    """Returns the pixels and channels of an image `[N, C, H, W]`, rows and columns of `[..., C]`."""
    channels = x.shape[1 if x.ndim == 4 else -1]
    return x.numel() // channels, channels
