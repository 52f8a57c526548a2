"""Checks the results of engines, so that an engine of another package that breaks the interface is named.

Without these checks its results would end in errors of this package or of diffusers, which say nothing of the engine.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edadm_cli.engines.base import CompiledDenoiser, Engine, EngineOptions, FileEngine, LayerExecution, OperationTime
from edadm_cli.plugins import wrong_result

RowT = TypeVar("RowT", LayerExecution, OperationTime)


def compile_denoiser(
    engine: Engine, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
) -> CompiledDenoiser:
    """Returns the result of `Engine.compile`.

    Raises:
        MachineError: It is no compiled denoiser.
    """
    return _denoiser(engine, engine.compile(denoiser, args, kwargs, options))


def load_denoiser(engine: FileEngine, *arguments: Any) -> CompiledDenoiser:
    """Returns the result of `FileEngine.load`.

    Raises:
        MachineError: It is no compiled denoiser.
    """
    return _denoiser(engine, engine.load(*arguments))


def require_like(engine: Engine, what: str, result: object, expected: Tensor) -> Tensor:
    """Returns what an engine computed, if it is a tensor with the expected shape.

    Args:
        engine: The engine.
        what: What it computed, such as "the layer 'conv_in'".
        result: Its result.
        expected: The exact result.

    Raises:
        MachineError: It is something else.
    """
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        tensor = f"a tensor with shape {tuple(expected.shape)} for {what}"
        raise wrong_result(f"The engine '{engine.name}'", engine, result, tensor)
    return result


def require_prediction(compiled: CompiledDenoiser, output: Any) -> Any:
    """Returns the output of a compiled denoiser, if `models.denoiser_calls.predictions` finds a prediction in it.

    Raises:
        MachineError: It is something else.
    """
    try:
        first = _first(output)
    except (LookupError, TypeError):
        first = None
    rows = first if isinstance(first, list) and first else [first]
    if not all(isinstance(row, Tensor) for row in rows):
        raise wrong_result("A denoiser", compiled, output, "the output object or the tuple that the denoiser returns")
    return output


def require_shape(
    compiled: CompiledDenoiser, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Checks that a prediction has the shape that the denoiser itself predicts.

    Nothing is checked if the denoiser's `forward` reads values of tensors, because it then cannot run on `meta`.

    Args:
        compiled: The denoiser on an engine.
        denoiser: The denoiser itself, with weights on the device `meta`, so that its call computes only shapes.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        output: The result of `compiled` for this call.

    Raises:
        MachineError: The prediction has another shape.
    """
    args, kwargs = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        with torch.no_grad():
            expected = _shape_of(denoiser(*args, **kwargs))
    except Exception:  # noqa: BLE001 - each forward fails in its own way
        return
    if _shape_of(output) != expected:
        raise wrong_result("A denoiser", compiled, _first(output), f"a prediction with shape {expected}")


def require_rows(compiled: CompiledDenoiser, what: str, rows: Any, kind: type[RowT]) -> list[RowT]:
    """Returns the rows in which a compiled denoiser describes itself.

    Args:
        compiled: The denoiser.
        what: Where the rows come from: its `layers` or its `profile`.
        rows: The rows.
        kind: The class that each row has.

    Raises:
        MachineError: They are something else.
    """
    if not isinstance(rows, list | tuple) or not all(isinstance(row, kind) for row in rows):
        raise wrong_result(f"'{what}' of a denoiser", compiled, rows, f"a list of '{kind.__name__}'")
    return list(rows)


def _first(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def _shape_of(output: Any) -> Any:
    """Returns the shape of a prediction, or a list of shapes if it has one tensor per row."""
    first = _first(output)
    return [tuple(row.shape) for row in first] if isinstance(first, list) else tuple(first.shape)


def _denoiser(engine: Engine, result: object) -> CompiledDenoiser:
    if not isinstance(result, CompiledDenoiser):
        expected = "a CompiledDenoiser of edadm_cli.engines.base"
        raise wrong_result(f"The engine '{engine.name}'", engine, result, expected)
    return result
