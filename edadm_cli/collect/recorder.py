"""What one batch of trajectories leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edadm_cli.collect.features import record_features
from edadm_cli.errors import InputError
from edadm_cli.models.calibration import CONDITION, CONSTANT, UNCONDITIONAL
from edadm_cli.models.calls import DenoiserCall, Template, record_calls
from edadm_cli.models.families import family_of
from edadm_cli.models.loading import LoadedModel


@dataclass
class BatchRecorder:
    """Records every denoiser call of one sampled batch.

    Args:
        model: The pipeline that samples.
        num_trajectories: n, trajectories of the batch.
        num_features: How many of them, from the first on, have their mid-block features kept.

    Attributes:
        latents: The model's input at each step, each with shape `(n, *)`, in the denoiser's element type: half
            the bytes where it computes in half precision, and no bit less.
        timesteps: The timestep at each step.
        features: The mid-block feature at each step, rows of the unconditional branch first.
        condition: Condition, one row a trajectory.
        unconditional: The other branch's condition; empty without guidance.
        constants: Tensors that all rows share.
        template: How the denoiser is called.
        branches: 2 with guidance, else 1.
    """

    model: LoadedModel
    num_trajectories: int
    num_features: int
    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    condition: dict[str, Tensor] = field(default_factory=dict)
    unconditional: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    template: Template = field(default_factory=dict)
    branches: int = 1
    _first: DenoiserCall | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the body samples."""
        denoiser = self.model.denoiser
        with record_calls(denoiser, self._on_call):
            if self.num_features == 0:
                yield
                return
            with record_features(denoiser, self._on_feature):
                yield

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the latents, by its name on disk."""
        named = {CONDITION + name: tensor for name, tensor in self.condition.items()}
        named.update({UNCONDITIONAL + name: tensor for name, tensor in self.unconditional.items()})
        named.update({CONSTANT + name: tensor for name, tensor in self.constants.items()})
        named["timesteps"] = torch.stack(self.timesteps)
        if self.features:
            named["features"] = torch.stack(self.features)
        return named

    def _on_call(self, call: DenoiserCall) -> None:
        step = len(self.latents)
        if not bool(call.sample.isfinite().all()):
            raise InputError(
                f"{self.model.ref.id}: the trajectories are not finite (NaN or infinity) "
                f"from step {step} on, timestep {call.timestep.item():g}.",
                hint=None if call.sample.dtype == torch.float32 else "edadm collect --dtype float32",
            )
        if self._first is None:
            self._keep_first(call)
        else:
            self._check_like_first(call, step)
        self.timesteps.append(call.timestep)
        self.latents.append(self._halves(call.sample, "sample")[1].cpu().clone())

    def _keep_first(self, call: DenoiserCall) -> None:
        rows = call.sample.shape[0]
        if rows not in (self.num_trajectories, 2 * self.num_trajectories):
            raise InputError(
                f"{self.model.ref.id} calls its denoiser with {rows} rows for {self.num_trajectories} "
                "images; one row an image, or two with guidance, can be calibrated."
            )
        self._first, self.template = call, call.template
        self.branches = rows // self.num_trajectories
        for name, tensor in call.condition.items():
            unconditional, conditional = self._order(tensor)
            self.condition[name] = _storable(conditional)
            if self.branches == 2:
                self.unconditional[name] = _storable(unconditional)
        self.constants = {name: _storable(tensor) for name, tensor in call.constants.items()}

    def _check_like_first(self, call: DenoiserCall, step: int) -> None:
        first = self._first
        assert first is not None
        changed = next((n for n, t in call.tensors.items() if not _equal(t, first.tensors.get(n))), None)
        if changed is None and (call.template != first.template or call.sample.shape != first.sample.shape):
            changed = "the form of the call"
        if changed is not None:
            raise InputError(
                f"{self.model.ref.id}: {changed} changes between the first step and step {step}; "
                "only conditions that stay the same over a trajectory can be calibrated."
            )

    def _on_feature(self, feature: Tensor) -> None:
        kept = [half[: self.num_features] for half in self._order(feature)[2 - self.branches :]]
        self.features.append(torch.cat(kept).cpu())

    def _halves(self, tensor: Tensor, name: str) -> Sequence[Tensor]:
        unconditional, conditional = self._order(tensor)
        if self.branches == 2 and not torch.equal(unconditional, conditional):
            raise InputError(
                f"{self.model.ref.id}: the two guidance branches get different values of {name}, "
                "which cannot be calibrated."
            )
        return unconditional, conditional

    def _order(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional rows; without guidance both are all rows."""
        if self.branches == 1:
            return tensor, tensor
        first, second = tensor.chunk(2)
        is_swapped = type(self.model.pipeline).__name__ in family_of(self.model.denoiser).conditional_first
        return (second, first) if is_swapped else (first, second)


def _storable(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone()


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other)
