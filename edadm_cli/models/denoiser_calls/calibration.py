"""Turns the calibration set into calls of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from edadm_cli.artifacts import Artifact, Payload
from edadm_cli.errors import InputError
from edadm_cli.models.collected import CONDITION, CONSTANT, UNCONDITIONAL
from edadm_cli.models.denoiser_calls.call_templates import Template, build_call, placed_tensors
from edadm_cli.stage_config import DTypeName

CALIBRATION_FILE = "calibration.safetensors"
_NAMES = ("sample", "timestep", "step_index", "trajectory_index")
TensorTypeName = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]


class TemplateModel(BaseModel):
    """The outer shape of a `Template`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    args: list[Any]
    kwargs: dict[str, Any]
    constants: list[str]
    dtypes: dict[str, TensorTypeName]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        places = placed_tensors({"args": self.args, "kwargs": self.kwargs})
        if places != set(self.dtypes):
            raise ValueError("the tensors in args and kwargs are not those that dtypes names")
        if not set(self.constants) <= places:
            raise ValueError("a constant is not among the tensors")
        return self


class ControlOutput(BaseModel):
    """A tensor of the denoiser's call that a control network computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...] = Field(description="of one row")


class ControlForm(BaseModel):
    """How a control network beside the denoiser is called; its conditions are named `<component>.<name>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: Literal["controlnet"]
    template: TemplateModel
    outputs: tuple[ControlOutput, ...] = Field(min_length=1, description="in the order in which they are returned")


class CallForm(Payload):
    """`call.json` of `collect` and `select`: the form of the denoiser's calls."""

    FILE: ClassVar[str] = "call.json"

    branches: Literal[1, 2] = Field(description="2 with guidance, else 1")
    dtype: DTypeName = Field(description="element type that the denoiser computed in")
    template: TemplateModel
    control: ControlForm | None = Field(
        None, description="of `collect`: the network that computes some inputs of the denoiser at every step"
    )
    varying: tuple[str, ...] = Field(
        (), description="of `collect`: conditions that have a value per step, which are stored with shape [N, T, ...]"
    )

    @property
    def constants(self) -> list[str]:
        """Names of the tensors that all rows share, those of the control network among them."""
        control = self.control
        of_control = [] if control is None else [f"{control.component}.{name}" for name in control.template.constants]
        return [*self.template.constants, *of_control]

    @property
    def conditions(self) -> list[str]:
        """Names of the tensors that are stored with one row per trajectory, those of the control network among them."""
        control, names = self.control, [n for n in self.template.dtypes if n not in self.template.constants]
        if control is None:
            return names
        computed = {output.name for output in control.outputs}
        of_control = [n for n in control.template.dtypes if n not in control.template.constants]
        return [n for n in names if n not in computed] + [f"{control.component}.{n}" for n in of_control]


@dataclass(frozen=True)
class CalibrationSet:
    """N samples, each of which is one step of a trajectory with its timestep and condition.

    Attributes:
        sample: The denoiser's inputs, with shape `(N, *)`.
        timestep: The scheduler's values, with shape `(N,)`.
        step_index: Position in the sampler's loop, with shape `(N,)`.
        trajectory_index: The trajectory each sample is from, with shape `(N,)`.
        condition: Tensors with one row per sample.
        unconditional: The same tensors in the branch without the prompt; empty without guidance.
        constants: Tensors that all samples share.
        template: How the denoiser is called; see `edadm_cli.models.denoiser_calls.calls`.
        branches: 2 with guidance, else 1.
        collected_in: Name of the element type that the denoiser computed in while the set was collected.
    """

    sample: Tensor
    timestep: Tensor
    step_index: Tensor
    trajectory_index: Tensor
    condition: dict[str, Tensor]
    unconditional: dict[str, Tensor]
    constants: dict[str, Tensor]
    template: Template
    branches: int
    collected_in: str

    @classmethod
    def load(cls, artifact: Artifact) -> CalibrationSet:
        """Reads the calibration set of a `select` artifact.

        Raises:
            InputError: A tensor is missing or does not fit the others.
        """
        tensors = artifact.tensors(CALIBRATION_FILE)
        missing = next((name for name in _NAMES if name not in tensors), None)
        if missing is not None:
            raise InputError(f"{artifact.file(CALIBRATION_FILE)} has no '{missing}'.", hint=artifact.remedy)
        calibration_set = cls.of(tensors, CallForm.load(artifact))
        calibration_set._check(artifact)
        return calibration_set

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], form: CallForm) -> CalibrationSet:
        """Returns the set with these tensors, which have the names of its file.

        Args:
            tensors: The tensors.
            form: The form of the denoiser's calls.
        """
        condition = {name: t for name, t in _below(tensors, CONDITION).items() if not name.startswith("unconditional.")}
        return cls(
            sample=tensors["sample"],
            timestep=tensors["timestep"],
            step_index=tensors["step_index"],
            trajectory_index=tensors["trajectory_index"],
            condition=condition,
            unconditional=_below(tensors, UNCONDITIONAL),
            constants=_below(tensors, CONSTANT),
            template=form.template.model_dump(),
            branches=form.branches,
            collected_in=form.dtype,
        )

    def __len__(self) -> int:
        return len(self.sample)

    def call(
        self, indices: Tensor | Sequence[int], device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of one denoiser call for some samples.

        Args:
            indices: The indices of `n` samples.
            device: The device of the tensors.
            dtype: Element type of the denoiser.

        Returns:
            `(args, kwargs)` with `n * branches` rows, those of the unconditional branch first. The timestep is a tensor
            with one value per row.
        """
        chosen = torch.as_tensor(indices, dtype=torch.long)

        def rows(first: Tensor, second: Tensor) -> Tensor:
            return torch.cat([first[chosen], second[chosen]]) if self.branches == 2 else second[chosen]

        tensors = {
            name: self._place(name, rows(self.unconditional.get(name, tensor), tensor), device, dtype)
            for name, tensor in self.condition.items()
        }
        tensors.update({name: self._place(name, t, device, dtype) for name, t in self.constants.items()})
        sample = rows(self.sample, self.sample).to(device, dtype)
        return build_call(self.template, sample, rows(self.timestep, self.timestep).to(device), tensors)

    def _place(self, name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Returns a tensor on the device; one in the denoiser's element type is cast to the new type."""
        recorded = self.template["dtypes"][name]
        return tensor.to(device, dtype if recorded == self.collected_in else getattr(torch, recorded))

    def _check(self, artifact: Artifact) -> None:
        problem = self._misfit()
        if problem is not None:
            raise InputError(f"The tensors of {artifact.path} do not fit each other: {problem}.", hint=artifact.remedy)

    def _misfit(self) -> str | None:
        """Returns the problem of the set; `None` if its tensors fit each other."""
        rows = {"sample": self.sample, "timestep": self.timestep, "step_index": self.step_index}
        rows |= {"trajectory_index": self.trajectory_index, **self.condition}
        rows |= {f"unconditional {name}": tensor for name, tensor in self.unconditional.items()}
        for name, tensor in rows.items():
            if tensor.ndim == 0 or len(tensor) != len(self.sample) or tensor.numel() == 0:
                return f"'{name}' has not one row for each sample"
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                return f"'{name}' is not a number everywhere"
        if self.sample.ndim < 2 or not bool(self.sample.isfinite().all() and self.timestep.isfinite().all()):
            return "the samples or timesteps are not finite"
        if any(
            index.is_floating_point() or bool((index < 0).any()) for index in (self.step_index, self.trajectory_index)
        ):
            return "step_index or trajectory_index are not indices"
        if set(self.template["dtypes"]) != set(self.condition) | set(self.constants):
            return "the call has other tensors than the set"
        if self.branches == 2 and any(
            name not in self.condition or tensor.shape != self.condition[name].shape
            for name, tensor in self.unconditional.items()
        ):
            return "the two branches of guidance differ in shape"
        return None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
