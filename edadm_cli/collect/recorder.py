"""Records the denoiser calls of one batch of trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.collect.branches import Conditions, are_branches, of_calls, of_rows
from edadm_cli.collect.control import CONTROL, ControlRecorder
from edadm_cli.collect.features import record_features
from edadm_cli.collect.varying import Varying
from edadm_cli.errors import InputError
from edadm_cli.models.collected import CONDITION, CONSTANT, FEATURES, TIMESTEPS, UNCONDITIONAL
from edadm_cli.models.denoiser_calls.call_templates import Template
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, record_calls
from edadm_cli.models.families import family_of, prepare_calls
from edadm_cli.models.loaded import LoadedModel

_GUIDANCE_INPUTS = ("guidance", "timestep_cond")
_NO_GUIDANCE = "--guidance-scale 1, which turns guidance off"


@dataclass
class BatchRecorder:
    """Records every denoiser call of one sampled batch.

    Args:
        model: The pipeline that samples.
        num_trajectories: n, the number of trajectories in the batch.
        num_features: The number of trajectories, from the first on, whose mid-block features are stored.

    Attributes:
        latents: The denoiser's input at each step, each with shape `(n, *)`, in the denoiser's element type.
        timesteps: The timestep at each step, each a scalar.
        condition: The tensors of the branch with the prompt by dotted name, with one row per trajectory.
        unconditional: The tensors of the branch without the prompt; empty without guidance.
        constants: Tensors that all rows share.
        template: The form of the denoiser's calls.
        branches: 2 with guidance, else 1.
        control: The calls of a control network beside the denoiser; `None` without one.
        calls_per_step: 2 if each branch is a call of its own, else 1.
        varying: The conditions whose values change from step to step.
        warnings: Warnings about the guidance, for the user.
    """

    model: LoadedModel
    num_trajectories: int
    num_features: int
    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    condition: dict[str, Tensor] = field(default_factory=dict)
    unconditional: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    template: Template = field(default_factory=dict)
    branches: int = 1
    calls_per_step: int = 1
    warnings: list[str] = field(default_factory=list)
    control: ControlRecorder | None = None
    varying: Varying = field(default_factory=Varying)
    _row_groups: int = 1
    _first: DenoiserCall | None = None
    _second: DenoiserCall | None = None
    _second_is_due: bool = False
    _is_further: bool = False
    _features: list[list[Tensor]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Returns a context that records the calls of the denoiser."""
        denoiser = self.model.denoiser
        prepare_calls(denoiser)
        network = getattr(self.model.pipeline, CONTROL, None)
        with ExitStack() as recordings:
            if isinstance(network, nn.Module):
                self.control = ControlRecorder(self.model.ref.id, network)
                recordings.enter_context(self.control.recording())
            recordings.enter_context(record_calls(denoiser, self._on_call))
            if self.num_features:
                recordings.enter_context(record_features(denoiser, self._on_feature))
            yield

    def control_form(self) -> dict[str, Any] | None:
        """Returns how the control network is called; `None` without one."""
        if self.control is None or self.control.first is None:
            return None
        outputs = zip(self.control.names, self.control.shapes, strict=True)
        return {
            "component": CONTROL,
            "template": self.control.first.template,
            "outputs": [{"name": name, "shape": shape} for name, shape in outputs],
        }

    @property
    def features(self) -> list[Tensor]:
        """The mid-block feature at each step, rows of the branch without the prompt first."""
        if not any(self._features):
            return []
        if self.calls_per_step == 2 and self.branches == 1:
            return [step[0] for step in self._features]
        if self.calls_per_step == 1:
            return [torch.cat(step) for step in self._features]
        return [torch.cat([step[-1], step[0]]) for step in self._features]

    @property
    def rows(self) -> int:
        """Number of rows of the sample in each call of the denoiser."""
        return self.num_trajectories * self._row_groups

    @property
    def is_guided(self) -> bool:
        """Whether the denoiser was called in two branches, or got the scale of the guidance as an input."""
        is_called_twice = self.branches == 2 or self.calls_per_step == 2
        return (
            is_called_twice
            or self._row_groups > 1
            or any(name in _GUIDANCE_INPUTS for name in (*self.condition, *self.constants))
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything but the latents, by its name on disk."""
        conditional, unconditional = self.varying.conditions(self.branches, self._split)
        named = {CONDITION + name: tensor for name, tensor in (self.condition | conditional).items()}
        named.update({UNCONDITIONAL + name: tensor for name, tensor in (self.unconditional | unconditional).items()})
        named.update({CONSTANT + name: tensor for name, tensor in self.constants.items()})
        named[TIMESTEPS] = torch.stack(self.timesteps)
        if self.features:
            named[FEATURES] = torch.stack(self.features)
        return named

    def _on_call(self, call: DenoiserCall) -> None:
        """Records a call as the next step, as the other branch of the latest step, or not at all.

        Raises:
            InputError: The sample is not finite, or the call has another form than those before.
        """
        step = len(self.latents)
        call = call if self.control is None else self.control.without_computed(call)
        if not bool(call.sample.isfinite().all()):
            raise InputError(
                f"{self.model.ref.id}: the trajectories are not finite (NaN or infinity) "
                f"from step {step} on, timestep {call.timestep.item():g}.",
                hint=None if call.sample.dtype == torch.float32 else "edadm collect --dtype float32",
            )
        self._is_further = False
        if self._first is None:
            self._keep_first(call)
        elif self._is_second(call):
            return
        elif self._repeats_step(call):
            self._skip()
            return
        else:
            self._check_like_first(call, step)
        self._second_is_due = True
        self._features.append([])
        self.timesteps.append(call.timestep.clone())
        self.latents.append(self._one_sample(call.sample).cpu().clone())

    def _repeats_step(self, call: DenoiserCall) -> bool:
        """Returns whether a call has the sample and the timestep of the latest step, but other conditions."""
        assert self._first is not None
        latest = self.latents[-1]
        if not torch.equal(call.timestep, self.timesteps[-1]) or call.sample.shape[1:] != latest.shape[1:]:
            return False
        is_same = all(torch.equal(rows.cpu(), latest) for rows in call.sample.split(len(latest)))
        return is_same and bool(self.varying.new(call, self._first))

    def _skip(self) -> None:
        """Leaves out a further call of the latest step, such as one whose attention the pipeline perturbs."""
        self._is_further = True
        warning = (
            f"{self.model.ref.id} calls its denoiser more often per step than guidance with the prompt needs; only the"
            " first call, or those with and without the prompt, calibrate."
        )
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _keep_first(self, call: DenoiserCall) -> None:
        """Records the conditions of the first call, and finds whether its rows are the two branches of guidance."""
        rows = call.sample.shape[0]
        if rows % self.num_trajectories != 0:
            raise InputError(
                f"{self.model.ref.id} calls its denoiser with {rows} rows for {self.num_trajectories} "
                "images; as many rows for each image can be calibrated."
            )
        self._first, self.template = call.copied(), call.template
        self._row_groups = rows // self.num_trajectories
        unconditional, conditional = self._split(call.sample)
        if self._row_groups == 2 and torch.equal(unconditional, conditional):
            self.branches = 2
        elif self._row_groups > 1:
            self.warnings.append(
                f"{self.model.ref.id} guides with {self._row_groups} rows per image that have different samples; only "
                "those with the prompt or the image calibrate."
            )
        self._store(of_rows(call, self.branches, self._split))
        if self.control is not None and self.control.first is not None:
            control = of_rows(self.control.first, self.branches, self._split)
            self.condition |= _of_control(control.conditional)
            self.unconditional |= _of_control(control.unconditional)
            self.constants |= _of_control(control.constants)

    def _is_second(self, call: DenoiserCall) -> bool:
        """Records a call as the other branch of the latest step and returns `True`, if it is one."""
        first, is_due = self._first, self._second_is_due
        assert first is not None
        if not is_due:
            return False
        if self._second is not None and call.sample.shape == self._second.sample.shape:
            is_like_second = not self.varying.new(call, self._second)
            is_second = is_like_second and bool(self.varying.new(call, first))
            if is_second:
                self.varying.add_second(call)
        else:
            is_second = len(self.latents) == 1 and self._row_groups == 1 and are_branches(first, call)
            if is_second:
                self._keep_second(first, call)
        if is_second:
            self._second_is_due = False
        return is_second

    def _keep_second(self, first: DenoiserCall, call: DenoiserCall) -> None:
        """Records the conditions of a second call of the first step, or warns that only the first call calibrates."""
        self._second, self.calls_per_step = call.copied(), 2
        conditions = of_calls(first, call, family_of(self.model.denoiser).masks)
        if self.control is not None:
            problem = "for which its control network is called again"
        elif isinstance(conditions, str):
            problem = f"in which {conditions} has another size or value"
        else:
            self.branches = 2
            self._store(conditions)
            return
        self.warnings.append(
            f"{self.model.ref.id} guides by a second call per step, {problem}; only the calls with the prompt "
            "calibrate."
        )

    def _store(self, conditions: Conditions) -> None:
        self.condition, self.unconditional = conditions.conditional, conditions.unconditional
        self.constants = conditions.constants

    def _check_like_first(self, call: DenoiserCall, step: int) -> None:
        assert self._first is not None
        changed = self.varying.add_step(call, self._first, self._second, step)
        if changed is not None:
            raise InputError(
                f"{self.model.ref.id}: {changed} changes between the first step and step {step}; "
                "only calls of one form and conditions of one shape over a trajectory can be calibrated."
            )

    def _on_feature(self, feature: Tensor) -> None:
        """Records the mid-block feature `(rows * k, C, *)` of the latest call for the first trajectories."""
        if self._is_further:
            return
        rows = self.rows
        if feature.shape[0] % rows:
            raise InputError(
                f"The blocks of {type(self.model.denoiser).__name__} compute with tensors whose first dimension does "
                f"not count the samples ({feature.shape[0]} for {rows} rows), so they cannot be calibrated by sample."
            )
        unconditional, conditional = self._split(_by_rows(feature, rows))
        is_guided_by_rows = self.branches == 2 and self.calls_per_step == 1
        parts = [unconditional, conditional] if is_guided_by_rows else [conditional]
        self._features[-1].extend(part[: self.num_features].cpu() for part in parts)

    def _one_sample(self, sample: Tensor) -> Tensor:
        """Returns the sample that both branches share, or that of the branch that calibrates.

        Raises:
            InputError: The branches shared their sample in the first step, but do not in this one.
        """
        unconditional, conditional = self._split(sample)
        if self.branches == 2 and not torch.equal(unconditional, conditional):
            raise InputError(
                f"{self.model.ref.id}: the two guidance branches get different values of sample, "
                "which cannot be calibrated together.",
                hint=_NO_GUIDANCE,
            )
        return conditional

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows without the prompt and those with it; without guidance in rows both are all rows."""
        groups = tensor.chunk(self._row_groups)
        is_swapped = type(self.model.pipeline).__name__ in family_of(self.model.denoiser).conditional_first
        return (groups[-1], groups[0]) if is_swapped else (groups[0], groups[-1])


def _of_control(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of the control network under their names among those of the denoiser."""
    return {f"{CONTROL}.{name}": tensor for name, tensor in tensors.items()}


def _by_rows(feature: Tensor, rows: int) -> Tensor:
    """Returns features `(rows * k, C, *)`, such as those of k frames of a clip, as `(rows, C, k, *)`."""
    return feature if feature.shape[0] == rows else feature.unflatten(0, (rows, -1)).transpose(1, 2)
