"""What an engine is: something that runs an exported denoiser in its own way and says layer by layer what it did.

The meaning of a quantized denoiser is that of `engines.reference`: exact integer sums, float32 epilogue. Every other
engine is compared with it before it is timed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from edadm_cli.errors import MachineError, UsageError
from edadm_cli.quant.layers import QuantizedLayer

LayerKind = Literal["conv2d", "linear", "attention"]
AttentionForm = Literal["float", "int8"]
"""How the products of attention are computed that the recipe leaves in floating point: in 16 bits or more, or with
operands that are quantized in every call."""
FLOAT = "float"
"""What the plan says of a layer that the recipe leaves in floating point."""
MAX_QUANTIZED_BITS = 8
"""A layer whose products are computed on elements of at most so many bits meets its plan: int8, int4, float8."""


def bits_of(precision: str) -> int | None:
    """Returns the bits of an element type, such as 8 of `int8` and `float8_e4m3fn`; `None` for other words."""
    match = re.match(r"(?:u?int|b?float)(\d+)", precision)
    return None if match is None else int(match[1])


def is_quantized(precision: str) -> bool:
    """Returns whether an element type is one that a plan of integers or of eight-bit floating point asks for."""
    bits = bits_of(precision)
    return bits is not None and bits <= MAX_QUANTIZED_BITS


@dataclass(frozen=True)
class LayerExecution:
    """How one layer of a denoiser runs.

    Attributes:
        name: Dotted name; the parts of a split layer have names of their own.
        kind: What is multiplied.
        planned: Bits such as `w4a8`, or `float`.
        precision: Element type of the products that really ran, such as `int8`, `float8_e4m3fn` or `float16`.
        reason: Why a planned layer does not run quantized; `None` where the plan is met.
    """

    name: str
    kind: LayerKind
    planned: str
    precision: str
    reason: str | None = None

    @property
    def is_met(self) -> bool:
        """Whether the layer runs as planned."""
        return self.planned == FLOAT or is_quantized(self.precision)


@dataclass(frozen=True)
class OperationTime:
    """Time of one operation of one call.

    Attributes:
        name: The name of the layer, or the engine's own name of an operation that is no layer.
        kind: A word such as `conv2d`, `linear`, `attention`, `norm`, `elementwise`, `reorder`.
        precision: The element type of its arithmetic.
        milliseconds: Its time in one call.
    """

    name: str
    kind: str
    precision: str
    milliseconds: float


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run.

    Attributes:
        device: The device that computes.
        rest_dtype: The element type of everything that is not quantized.
        num_threads: The number of CPU threads; `None` leaves it to the engine.
        attention: How attention is computed that the recipe leaves in floating point.
    """

    device: torch.device
    rest_dtype: torch.dtype = torch.float32
    num_threads: int | None = None
    attention: AttentionForm = "float"


class CompiledDenoiser(ABC):
    """A denoiser on an engine. Calls take and return what the denoiser itself does."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser; the output has the denoiser's own class, and `return_dict` is honoured."""

    @property
    @abstractmethod
    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns how each layer runs, in the order of the denoiser's modules."""

    def set_strengths(self, strengths: Mapping[tuple[str, str], float]) -> None:
        """Weight the adapters that the denoiser was compiled with; see `engines.adapters`.

        Raises:
            UsageError: The engine has none.
        """
        raise UsageError(
            "The engine runs the denoiser without adapters.", hint="edadm_cli.load(FOLDER, engine='torch')"
        )

    def parts(self) -> nn.Module:
        """Returns the denoiser that runs, as modules whose calls can be left out one by one, for step caching.

        Raises:
            UsageError: A step runs as one graph.
        """
        raise UsageError(
            "The engine runs each step as one graph, and a cache leaves out parts of a step: run the export in torch,"
            " without --engine."
        )

    @abstractmethod
    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns the time of each operation of one call, in execution order."""


class Engine(ABC):
    """One way to run quantized denoisers.

    Attributes:
        name: The name that users type.
        description: One line for people.
        device_types: The types of the devices that it runs on, such as `cpu`.
        layer_bound: The largest relative L2 distance of one layer from exact integer arithmetic on equal inputs, with a
            float32 rest. It bounds what the engine's way of rounding and scaling costs.
        takes_adapters: Whether LoRA adapters of the denoiser run beside its layers; see `engines.adapters`.
        attention_forms: What `EngineOptions.attention` may be.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]
    layer_bound: ClassVar[float]
    takes_adapters: ClassVar[bool] = False
    attention_forms: ClassVar[tuple[AttentionForm, ...]] = ("float",)

    @abstractmethod
    def refusal(self, device: torch.device) -> str | None:
        """Returns why the engine cannot run on `device` of this machine, as a sentence; `None` when it can."""

    @abstractmethod
    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns why the engine cannot run a layer in integers, as half a sentence; `None` when it can."""

    @abstractmethod
    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Compiles a quantized denoiser for this engine.

        Args:
            denoiser: A denoiser with quantized layers, on the CPU or on the engine's device; it is not changed.
            args: Positional arguments of a call like those to come; later calls may have other batch and image sizes.
            kwargs: Keyword arguments of that call.
            options: The device, and the precision of the rest.

        Raises:
            MachineError: The engine cannot run here; see `refusal`.
            EdadmError: The denoiser holds something that the engine cannot express.
        """

    @abstractmethod
    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Compiles one quantized layer for this engine, for inputs with the shape of `x`."""

    def require(self, device: torch.device) -> None:
        """Refuses a machine that the engine cannot run on.

        Raises:
            MachineError: With `refusal`'s sentence.
        """
        reason = self.refusal(device)
        if reason is not None:
            raise MachineError(reason, hint="edadm engines")

    def require_attention(self, form: AttentionForm) -> None:
        """Refuses a form of attention that the engine does not have.

        Raises:
            UsageError: Naming the form.
        """
        if form not in self.attention_forms:
            raise UsageError(
                f"The engine '{self.name}' computes attention in {' or '.join(self.attention_forms)}, not in {form}.",
                hint="leave out --attention, or use --engine cuda",
            )


class FileEngine(Engine):
    """An engine that keeps a compiled denoiser in files, so that loading it needs no conversion.

    Attributes:
        files_format: A number that grows whenever files of earlier versions must be made again.
    """

    files_format: ClassVar[int] = 1

    @abstractmethod
    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Writes the engine's files of a quantized denoiser to `folder`; see `compile`."""

    @abstractmethod
    def load(self, folder: Path, options: EngineOptions) -> CompiledDenoiser:
        """Reads what `save` wrote.

        Raises:
            InputError: The files are missing, broken, or of another version.
        """
