"""The interface of a contender: it is prepared in the command's process and loaded in the process that runs it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from edadm_cli.bench.spec import TORCH, Call, ContenderEnvironment, Spec
from edadm_cli.engines.base import EngineOptions, FileEngine
from edadm_cli.engines.cuda.capture import GraphedFunction
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import MachineError
from edadm_cli.models.architecture import find_class


@dataclass(frozen=True)
class DenoiserFacts:
    """Facts about a denoiser that remain when its weights are released.

    Attributes:
        class_path: Module and name of its class.
        num_weights: Number of its parameters.
        linear_weights: Number of weights in linear layers.
        convolution_weights: Number of weights in convolutions.
        num_convolutions: Number of convolutions.
    """

    class_path: str
    num_weights: int
    linear_weights: int
    convolution_weights: int
    num_convolutions: int

    @classmethod
    def of(cls, denoiser: nn.Module) -> DenoiserFacts:
        """Counts the weights of a denoiser."""
        modules = list(denoiser.modules())
        linear = [module.weight.numel() for module in modules if isinstance(module, nn.Linear)]
        convolutions = [module.weight.numel() for module in modules if isinstance(module, nn.Conv2d)]
        return cls(
            class_path=f"{type(denoiser).__module__}.{type(denoiser).__qualname__}",
            num_weights=sum(parameter.numel() for parameter in denoiser.parameters()),
            linear_weights=sum(linear),
            convolution_weights=sum(convolutions),
            num_convolutions=len(convolutions),
        )


@dataclass(frozen=True)
class Preparation:
    """The input of a contender's preparation.

    Attributes:
        facts: Facts about the denoiser at full precision.
        denoiser_folder: The folder that it is saved to, in float32.
        scratch: Folder for the files of contenders.
        calls: Calls of the first batch size, with float32 tensors.
        environment: Device and threads of the contenders.
        dtype: Name of the element type of what is not quantized.
        half: Name of the half-precision type; `None` if the device has no fast one.
        compiled: Whether torch.compile takes part at full precision.
    """

    facts: DenoiserFacts
    denoiser_folder: Path
    scratch: Path
    calls: Sequence[Call]
    environment: ContenderEnvironment
    dtype: str
    half: str | None
    compiled: bool

    @property
    def device(self) -> torch.device:
        """Returns the device of the contenders."""
        return torch.device(self.environment.device)

    def folder(self, name: str) -> Path:
        """Returns the folder for the files of a contender."""
        return self.scratch / name

    def denoiser(self) -> nn.Module:
        """Loads the denoiser at full precision, in float32 on the CPU."""
        return load_denoiser(self.denoiser_folder, self.facts.class_path, torch.float32)

    def float_mib(self, dtype: str) -> float:
        """Returns the size of the denoiser's weights in an element type, in MiB."""
        return self.facts.num_weights * _bytes(dtype) / 2**20

    def eight_bit_mib(self, rest: str, num_weights: int) -> float:
        """Returns the size in MiB if `num_weights` weights take one byte each, and the others have the type `rest`."""
        return self.float_mib(rest) - num_weights * (_bytes(rest) - 1) / 2**20


class Contender(ABC):
    """A way to run a denoiser, in one or several forms.

    Attributes:
        name: Its name after `--against`, and the `engine` of its specs.
        packages: The Python packages that it needs.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    def require(self, device: torch.device) -> None:
        """Refuses a machine or a device that the contender cannot run on, before any work is done.

        Raises:
            MachineError: A package is not installed, or the device cannot run the contender.
            UsageError: The contender does not run on this kind of device.
        """
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                name = package.replace("_", "-")
                raise MachineError(
                    f"--against {self.name} needs the package '{name}', which is not installed here.",
                    hint=f"pip install {name}",
                )

    @abstractmethod
    def prepare(self, context: Preparation) -> list[Spec]:
        """Writes the files that the contender needs and returns its forms; the command's process calls this once."""

    def load(self, spec: Spec, environment: ContenderEnvironment) -> Callable[..., Any]:
        """Loads one form in the process that runs it, and returns a function with the arguments of the denoiser."""
        device, dtype = torch.device(environment.device), getattr(torch, spec.dtype)
        if spec.runs_on == TORCH:
            denoiser = load_denoiser(spec.folder, spec.denoiser_class, dtype)
            return torch_function(self.quantized(denoiser, spec, device), spec, environment)
        engine = engine_of(spec.runs_on)
        assert isinstance(engine, FileEngine)
        assert spec.folder is not None
        options = EngineOptions(device, dtype, environment.threads if device.type == "cpu" else None)
        return engine.load(spec.folder, options)

    def quantized(self, denoiser: nn.Module, spec: Spec, device: torch.device) -> nn.Module:
        """Quantizes a torch denoiser as this tool's users would; at full precision it stays as it is."""
        return denoiser


def load_denoiser(folder: Path | None, class_path: str | None, dtype: torch.dtype) -> nn.Module:
    """Reads a denoiser at full precision from the folder that it was saved to.

    Args:
        folder: The folder.
        class_path: Module and name of its class, which need not be one of diffusers.
        dtype: Element type of its weights.
    """
    from edadm_cli.models.quiet import quiet_libraries

    assert folder is not None
    assert class_path is not None
    with quiet_libraries():
        cls: Any = find_class(class_path)
        denoiser: nn.Module = cls.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return denoiser.eval().requires_grad_(False)


def torch_function(denoiser: nn.Module, spec: Spec, environment: ContenderEnvironment) -> Callable[..., Any]:
    """Returns a torch denoiser as its spec asks: with channels last, compiled, or in a CUDA graph."""
    nn.Module.to(denoiser, torch.device(environment.device))
    if spec.channels_last:
        nn.Module.to(denoiser, memory_format=torch.channels_last)
    function: Callable[..., Any] = denoiser
    if spec.compiled:
        if environment.compile_mode is not None:
            _silence_autotuning()
        function = torch.compile(function, dynamic=False, mode=environment.compile_mode)
    if spec.graphs:
        return GraphedFunction(function)
    return function


def _silence_autotuning() -> None:
    """Keeps torch from writing a table of timings for every product to the terminal."""
    from torch._inductor import config

    config.autotune_num_choices_displayed = 0
    config.max_autotune_report_choices_stats = False


def _bytes(dtype: str) -> int:
    return int(torch.empty(0, dtype=getattr(torch, dtype)).element_size())
