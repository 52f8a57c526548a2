"""Computes the inputs of a denoiser that come from a control network, for the samples of a calibration set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import (
    CONDITION,
    CONSTANT,
    UNCONDITIONAL,
    CalibrationSet,
    CallForm,
    ControlForm,
)
from edadm_cli.models.denoiser_calls.calls import flat_tensors
from edadm_cli.progress import Reporter


def with_computed(
    tensors: Mapping[str, Tensor],
    form: CallForm,
    collected: CollectedRun,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """Returns a calibration set that holds the control network's outputs in place of its conditions.

    Args:
        tensors: The tensors of the calibration set, by their names in its file.
        form: The form of the calls of the denoiser and of its control network.
        collected: The run, which loads the control network.
        device: The device that computes.
        reporter: It reports the progress.

    Raises:
        InputError: The model is missing, or its files differ from those that were collected from.
    """
    control = form.control
    if control is None:
        return dict(tensors)
    calibration = _of_control(tensors, form, control)
    network = collected.load(device, collected.dtype).pipeline.components[control.component]
    conditional: dict[str, list[Tensor]] = {output.name: [] for output in control.outputs}
    unconditional: dict[str, list[Tensor]] = {output.name: [] for output in control.outputs}
    portions = torch.arange(len(calibration)).split(collected.entry.batch_size)
    with torch.no_grad(), reporter.task("Computing control", len(portions)) as advance:
        for portion in portions:
            args, kwargs = calibration.call(portion, device, collected.dtype)
            outputs = flat_tensors(network(*args, **kwargs))
            for output, tensor in zip(control.outputs, outputs, strict=True):
                *without, rows = tensor.cpu().chunk(form.branches)
                conditional[output.name].append(rows)
                unconditional[output.name].extend(without)
            advance(1)
    start = f"{control.component}."
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(name.startswith(prefix + start) for prefix in (CONDITION, UNCONDITIONAL, CONSTANT))
    }
    rest |= {CONDITION + name: torch.cat(parts) for name, parts in conditional.items()}
    return rest | {UNCONDITIONAL + name: torch.cat(parts) for name, parts in unconditional.items() if parts}


def _of_control(tensors: Mapping[str, Tensor], form: CallForm, control: ControlForm) -> CalibrationSet:
    """Returns the calls of the control network for the samples of a calibration set."""
    start = f"{control.component}."

    def below(prefix: str) -> dict[str, Tensor]:
        names = [name for name in tensors if name.startswith(prefix + start)]
        return {name.removeprefix(prefix + start): tensors[name] for name in names}

    return CalibrationSet(
        sample=tensors["sample"],
        timestep=tensors["timestep"],
        step_index=tensors["step_index"],
        trajectory_index=tensors["trajectory_index"],
        condition=below(CONDITION),
        unconditional=below(UNCONDITIONAL),
        constants=below(CONSTANT),
        template=control.template.model_dump(),
        branches=form.branches,
        collected_in=form.dtype,
    )
