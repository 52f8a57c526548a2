"""Prepares a quantized denoiser for timing on an engine, after its layers were compared with exact integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import Coverage, EngineParity, LayerRow
from edadm_cli.bench.spec import Call, Spec, folder_mib, placed
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import (
    FLOAT,
    CompiledDenoiser,
    Engine,
    EngineOptions,
    FileEngine,
    LayerExecution,
    is_quantized,
)
from edadm_cli.engines.parity import LayerParity, compare_layers, relative_l2
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.engines.results import compile_denoiser, require_like
from edadm_cli.errors import EdadmError
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.layers import quantized_layers

FAKE_QUANTIZE_FACTOR = 2.0
QUANTIZATION_SHARE = 0.5


@dataclass(frozen=True)
class Prepared:
    """A quantized denoiser that may be timed once its prediction has been checked.

    Attributes:
        spec: The contender.
        parity: The errors of its layers, and its prediction in exact integers.
        fake_quantize_error: Returns the relative L2 distance from the exact prediction to that of torch's
            quantize-dequantize, with unquantized operations in the same element type. It is a call of the denoiser in
            torch, which takes long on a CPU and is rarely needed.
        source: Compiles the denoiser; `None` if the engine loads it from files.
    """

    spec: Spec
    parity: LayerParity
    fake_quantize_error: Callable[[], float]
    source: Callable[[], CompiledDenoiser] | None


def prepare(
    engine: Engine,
    denoiser: nn.Module,
    again: Callable[[], nn.Module],
    bits: BitWidth,
    call: Call,
    options: EngineOptions,
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Compares every layer with exact integers, and writes the engine's files where it has any.

    Args:
        engine: The engine that runs the denoiser.
        denoiser: The denoiser with quantized layers, in float32 on the CPU; it is moved to the engine's device.
        again: Returns the same denoiser, made or loaded anew: it is not held in memory while contenders are timed.
        bits: Its bit width.
        call: A call of the denoiser with float32 tensors.
        options: The options with which the denoiser is timed; its layers are compared in float32.
        folder: Folder of the engine's files; existing files are used.
        advance: Progress callback, called after every layer.

    Raises:
        EdadmError: The error of a layer exceeds the engine's bound.
    """
    device, dtype = options.device, options.rest_dtype
    denoiser = nn.Module.to(denoiser, device)
    args, kwargs = placed(call, device, torch.float32)
    exact = EngineOptions(device, torch.float32, options.num_threads)
    parity = compare_layers(engine, denoiser, args, kwargs, exact, advance)
    require_layers(engine, parity)
    error = partial(_fake_quantize_error, call=call, device=device, dtype=dtype, exact=parity.prediction)
    if isinstance(engine, FileEngine):
        if not folder.is_dir():
            engine.save(denoiser, args, kwargs, options, folder)
        spec = _spec(engine, bits, options, folder, folder_mib(folder))
        return Prepared(spec, parity, lambda: error(again()), None)
    # now, because later the contenders fill the device's memory
    distance = error(denoiser if dtype == torch.float32 else copy.deepcopy(denoiser))
    # until it is compiled it stays on the CPU, so that contenders have the memory of the GPU
    source = partial(compile_denoiser, engine, nn.Module.to(denoiser, "cpu"), args, kwargs, options)
    return Prepared(_spec(engine, bits, options, None, packed_mib(denoiser)), parity, lambda: distance, source)


def _spec(engine: Engine, bits: BitWidth, options: EngineOptions, folder: Path | None, size_mib: float) -> Spec:
    form = options.attention
    return Spec(
        name=f"{engine.name} {bits}" + (f", attention {form}" if form != "float" else ""),
        engine=engine.name,
        runs_on=engine.name,
        dtype=str(options.rest_dtype).removeprefix("torch."),
        bits=str(bits),
        compiled=True,
        folder=folder,
        size_mib=size_mib,
    )


def require_layers(engine: Engine, parity: LayerParity) -> None:
    """Refuses an engine whose arithmetic is not that of the reference.

    Raises:
        EdadmError: The error of a layer, which the message names, exceeds the engine's bound.
    """
    if not parity.errors:
        return
    name, error = parity.worst
    if not error <= engine.layer_bound:
        raise EdadmError(
            f"The engine '{engine.name}' is not timed: its layer '{name}' is off by {error:.2e} from exact integers,"
            f" the bound is {engine.layer_bound:.0e}."
        )


def check_prediction(prepared: Prepared, engine: Engine, prediction: Tensor, full_precision: Tensor) -> EngineParity:
    """Compares the prediction of the denoiser that will be timed with the one in exact integers.

    An activation at the edge between two codes may fall on either side after any change of rounding, and the network
    propagates that. The bound of a single layer therefore does not apply to the whole denoiser. The bound is half of
    the error of quantization itself, or twice the error of torch's own quantize-dequantize with unquantized operations
    in the same element type, whichever is larger; the second is computed only if the first is exceeded. An engine may
    also leave operands in floating point where that is faster. Its prediction then differs from the one in exact
    integers by what their quantization costs, and need only be as near to full precision as the prediction in exact
    integers.

    Args:
        prepared: The prepared denoiser.
        engine: Its engine.
        prediction: The prediction that the engine computed.
        full_precision: The prediction at full precision.

    Raises:
        EdadmError: The relative L2 distance exceeds the bound.
        MachineError: The prediction has another shape.
    """
    parity = prepared.parity
    require_like(engine, "the prediction", prediction, parity.prediction)
    cost = relative_l2(parity.prediction, full_precision)
    bound = QUANTIZATION_SHARE * cost
    error = relative_l2(prediction, parity.prediction)
    if not error <= bound and relative_l2(prediction, full_precision) <= cost:
        bound = max(error, 2 * cost)  # the largest distance of two predictions that are this near to a third one
    if not error <= bound:
        bound = max(bound, FAKE_QUANTIZE_FACTOR * prepared.fake_quantize_error())
    if not error <= bound:
        raise EdadmError(
            f"The engine '{engine.name}' is not timed: its prediction is off by {error:.2e} from exact integers, the"
            f" bound is {bound:.2e}, and quantization costs {cost:.2e}."
        )
    layer, worst = parity.worst if parity.errors else ("none", 0.0)
    return EngineParity(
        max_rel_l2=worst,
        bound=engine.layer_bound,
        layer=layer,
        layers_checked=len(parity.errors),
        layers=parity.num_layers,
        prediction_rel_l2=error,
        prediction_bound=bound,
        quantization_rel_l2=cost,
    )


def coverage_of(layers: Iterable[LayerExecution], engine: Engine) -> tuple[Coverage, tuple[LayerRow, ...]]:
    """Returns the number of layers that were planned and that run in integers, and a row for each layer.

    Raises:
        EdadmError: A planned layer does not run in integers and the engine does not say why.
    """
    rows = tuple(layers)
    for row in rows:
        if not row.is_met and row.reason is None:
            raise EdadmError(
                f"The engine '{engine.name}' runs the layer '{row.name}' in {row.precision} though it is planned as"
                f" {row.planned}, and does not say why."
            )
    planned = [row for row in rows if row.planned != FLOAT]
    coverage = Coverage(
        planned=len(planned),
        quantized=sum(is_quantized(row.precision) for row in planned),
        kept=len(rows) - len(planned),
    )
    listed = tuple(
        LayerRow(name=row.name, kind=row.kind, planned=row.planned, precision=row.precision, reason=row.reason)
        for row in rows
    )
    return coverage, listed


def packed_mib(denoiser: nn.Module) -> float:
    """Returns the stored size of a quantized denoiser's tensors in MiB: packed codes, float32 scales, and the rest."""
    return sum(tensor.nbytes for tensor in denoiser.state_dict().values()) / 2**20


@torch.no_grad()
def _fake_quantize_error(
    denoiser: nn.Module, call: Call, device: torch.device, dtype: torch.dtype, exact: Tensor
) -> float:
    """Returns the relative L2 distance from `exact` to the prediction of quantize-dequantize in torch.

    All operations run in `dtype`. The denoiser is changed: it is cast, and keeps no float copies of its weights.
    """
    nn.Module.to(denoiser, device, dtype)
    use_arithmetic(denoiser, "fake-quantize")
    for layer in quantized_layers(denoiser).values():
        layer.keeps_float_weight = False  # a single call needs it once
    args, kwargs = placed(call, device, dtype)
    return relative_l2(prediction_of(denoiser(*args, **kwargs)).float(), exact)
