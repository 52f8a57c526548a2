"""Divides the memory of a GPU between the rows that units learn from and the work on them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch

from edadm_cli.models.gpu_memory import available_bytes, gpu_peak
from edadm_cli.reconstruct.call_signatures import UnitForm, probe_units
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.unit_data import EVALUATED_ROWS

_MIB = 2**20
_CPU_BUDGET_MIB = 4096
_USABLE = 0.97  # share of the available memory: the rest is lost between blocks of the allocator
_LEAST_SHARE = 0.25  # share of the available memory that rows may take in any case
_LEARNER_COPIES = 11  # of a unit's weights, float32: alpha, its gradient and moments, codes, scale, h, weights
_STEP_ACTIVATIONS = 12  # times the largest tensor in a unit: what is alive at once in a step
_ACTIVATIONS = 3.5  # the same in a forward without gradients


def working_bytes(
    context: ReconstructionContext, hyperparameters: Hyperparameters, forms: Mapping[str, UnitForm], forward: float
) -> float:
    """Returns the bytes that learning takes at its peak, beside the denoiser's weights and the rows.

    Args:
        context: The objects that are reconstructed.
        hyperparameters: The numbers of the optimization.
        forms: The forms of the calls of the units that learn.
        forward: Bytes of the activations of a forward of the denoiser on one batch.
    """
    batches = context.batches
    widest = max(kind.bytes for form in forms.values() for kind in (*form.inputs, *form.layers.values()))
    largest = max(4 * context.num_weights(unit) for unit in context.learning)
    evaluated = min(batches.num_rows, max(EVALUATED_ROWS, hyperparameters.batch_size, batches.batch_size))
    activations = max(_ACTIVATIONS * evaluated, _STEP_ACTIVATIONS * hyperparameters.batch_size) * widest
    return max(forward, activations) + _LEARNER_COPIES * largest


def rows_budget(mib: int | None, context: ReconstructionContext, hyperparameters: Hyperparameters) -> int:
    """Returns the bytes of memory for rows: as given, else 4 GiB on a CPU, or what the work leaves free on a GPU.

    On a GPU, one forward of the denoiser on one batch measures what its activations take.

    Args:
        mib: The budget that the user gives, MiB.
        context: The objects that are reconstructed; the denoiser is on its device, in full precision.
        hyperparameters: The numbers of the optimization.
    """
    device = context.network.device
    fixed = fixed_budget(mib, device)
    if fixed is not None:
        return fixed
    denoiser, batches = context.network.denoiser, context.batches
    forms = probe_units(denoiser, context.learning, batches)
    args, kwargs = batches.call(batches.indices()[0])
    with gpu_peak(device) as forward, torch.no_grad(), suppress(torch.OutOfMemoryError):  # captures halve such a batch
        denoiser(*args, **kwargs)
    return memory_left(device, working_bytes(context, hyperparameters, forms, forward.bytes) + batches.later_bytes())


def fixed_budget(mib: int | None, device: torch.device) -> int | None:
    """Returns the bytes for rows as the user gives them, or 4 GiB on a CPU; `None` if they depend on the work."""
    if mib is not None:
        return mib * _MIB
    return None if device.type == "cuda" else _CPU_BUDGET_MIB * _MIB


def memory_left(device: torch.device, working: float) -> int:
    """Returns the bytes of a GPU for rows, where the work on them takes `working` bytes."""
    available = available_bytes(device)
    return int(max(_USABLE * available - working, _LEAST_SHARE * available))
