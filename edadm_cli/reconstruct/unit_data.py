"""The data of one unit: rows of inputs and targets, losses, and the result of learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_cli.artifacts import UnitLosses
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.quant.fusion import flat, fused
from edadm_cli.reconstruct.capture import UnitCalls, layer_outputs
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.rows import RowCache, Rows, chunks

EVALUATED_ROWS = 64


@dataclass
class UnitData:
    """The rows of inputs and targets that one unit learns from.

    The full-precision inputs may be released if none of them is mixed into the inputs of the quantized network.

    Attributes:
        full_precision: Its calls in the network in full precision; their outputs are the targets.
        quantized: Its calls in the partly quantized network.
        layer_targets: The outputs of its layers in full precision, by name.
        row_factors: What the outputs and targets of each row are multiplied by before they are compared, `[rows]`.
    """

    full_precision: UnitCalls
    quantized: UnitCalls
    layer_targets: dict[str, Rows]
    row_factors: Rows | None = None


@dataclass(frozen=True)
class UnitResult:
    """The result of one unit.

    Attributes:
        params: Its quantization parameters under the names of the artifact.
        losses: Its losses, and whether learning made it worse, so that it keeps its nearest rounding.
    """

    params: dict[str, Tensor]
    losses: UnitLosses


def channel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns |output - target|^2, summed over channels and averaged over the rest.

    Channels are dimension 1 of `[N, C, H, W]`, otherwise the last dimension.
    """
    channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
    function = _SquaredError if output.is_cuda else _SquaredErrorOnCpu
    error: Tensor = function.apply(output, target)
    return error * (channels / output.numel())


def row_losses(outputs: Sequence[Tensor], targets: Sequence[Tensor], rows: int) -> Tensor:
    """Returns the loss of each row, `[rows]` float64: the mean over the rows is the sum of `channel_loss`."""
    total = torch.zeros(rows, dtype=torch.float64, device=outputs[0].device)
    for output, target in zip(outputs, targets, strict=True):
        channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
        total += (output - target).double().square().reshape(rows, -1).mean(dim=1) * channels
    return total


def scaled_rows(tensors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Returns tensors `[n * entries, ...]` whose rows are multiplied by their factors `[n]`."""
    return [
        tensor * factors.repeat_interleave(len(tensor) // len(factors)).view(-1, *[1] * (tensor.dim() - 1))
        for tensor in tensors
    ]


def _squared_errors(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square_()


def _slope(output: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    return (output - target).mul_(factor)


class _SquaredError(torch.autograd.Function):
    """The sum of (output - target)^2, with a gradient to the output alone, for a GPU."""

    @staticmethod
    def forward(ctx, output, target):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(output, target)
        return fused(_squared_errors, output)(flat(output), flat(target)).sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        output, target = ctx.saved_tensors
        return fused(_slope, output)(flat(output), flat(target), 2 * grad).view(output.shape), None


class _SquaredErrorOnCpu(torch.autograd.Function):
    """The same, with the difference stored: a CPU has no fused kernel that computes it once more in passing."""

    @staticmethod
    def forward(ctx, output, target):  # type: ignore[no-untyped-def]
        difference = (output - target).contiguous()
        ctx.save_for_backward(difference)
        return difference.view(-1).square().sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (difference,) = ctx.saved_tensors
        return difference * (2 * grad), None


def layer_targets(
    network: SwitchableNetwork,
    unit: Unit,
    calls: UnitCalls,
    batch_size: int,
    cache: RowCache,
    processes: Processes = ALONE,
) -> dict[str, Rows]:
    """Returns the full-precision outputs of a unit's layers except the last, over all its calls, `[rows, ...]` each.

    Args:
        network: The network that contains the unit.
        unit: The unit.
        calls: Its full-precision calls.
        batch_size: Rows per forward.
        cache: Stores the outputs.
        processes: The processes that share the rows.
    """
    targets = {name: cache.allocate(calls.rows, kind) for name, kind in calls.form.layers.items()}
    parts = chunks(calls.rows, batch_size)[processes.index :: processes.count]
    with network.full_precision(), layer_outputs(network.denoiser, list(targets)) as outputs, torch.no_grad():
        for places in parts:
            args, kwargs = calls.call(on_device(calls.tensors, places, network.device))
            unit.module(*args, **kwargs)
            for name, rows in targets.items():
                rows.write(places, outputs[name])
    processes.wait()
    return targets


def size_of(rows: Rows) -> float:
    """Returns |x|^2 of the first rows, summed and averaged as in `channel_loss`."""
    first = rows.kind.joined(rows.read(range(min(rows.count, EVALUATED_ROWS)))).float()
    return float(channel_loss(first, torch.zeros_like(first)))


def on_device(group: Sequence[Rows], places: Sequence[int], device: torch.device) -> list[Tensor]:
    """Returns some rows of several tensors, as the tensors of a call on `device`."""
    return [rows.kind.joined(rows.read(places).to(device)) for rows in group]
