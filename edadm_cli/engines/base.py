"""The interface of an engine, which runs an exported denoiser and says for each layer how it ran.

`engines.reference` defines what a quantized denoiser computes: exact integer sums and a float32 epilogue. Every other
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
"""The form of those attention products that the recipe leaves in float.

`float` computes them in 16 bits or more. `int8` quantizes their operands in every call.
"""
FLOAT = "float"
"""The planned bits of a layer that the recipe leaves in float."""
MIXED = "mixed"
"""The precision of a layer that runs partly in int8 and partly in floating point, as an attention can."""
ONE_GRAPH = (
    "The engine runs each step as one graph, and a cache leaves out parts of a step: run the export in torch, without"
    " --engine."
)
"""The reason why an engine takes no step cache."""
MAX_QUANTIZED_BITS = 8
"""The largest number of bits per element of a quantized product, such as int8, int4 or float8."""


def bits_of(precision: str) -> int | None:
    """Returns the bits of an element type, such as 8 for `int8` and `float8_e4m3fn`; `None` for any other word."""
    match = re.match(r"(?:u?int|b?float)(\d+)", precision)
    return None if match is None else int(match[1])


def is_quantized(precision: str) -> bool:
    """Returns whether products in an element type count as quantized: they have at most 8 bits per element."""
    bits = bits_of(precision)
    return bits is not None and bits <= MAX_QUANTIZED_BITS


@dataclass(frozen=True)
class LayerExecution:
    """Says how one layer of a denoiser runs.

    Attributes:
        name: The dotted name of the layer. Each part of a split layer has its own name.
        kind: The kind of the layer.
        planned: The planned bits, such as `w4a8`, or `float`.
        precision: The element type in which the products are actually computed, such as `int8`, `float8_e4m3fn` or
            `float16`; `mixed` if some of them run in int8 and others in floating point.
        reason: Why a layer does not run as planned; `None` if it does.
    """

    name: str
    kind: LayerKind
    planned: str
    precision: str
    reason: str | None = None

    @property
    def is_met(self) -> bool:
        """Returns whether the layer runs as planned."""
        return self.planned == FLOAT or is_quantized(self.precision)


@dataclass(frozen=True)
class OperationTime:
    """Holds the time of one operation in one call.

    Attributes:
        name: The name of the layer, or the engine's own name of an operation that is not a layer.
        kind: The kind of the operation, such as `conv2d`, `linear`, `attention`, `norm`, `elementwise` or `reorder`.
        precision: The element type of its arithmetic; `mixed` if it computes products of both kinds.
        milliseconds: The time of the operation in one call.
    """

    name: str
    kind: str
    precision: str
    milliseconds: float


@dataclass(frozen=True)
class EngineOptions:
    """Holds the options of an engine.

    Attributes:
        device: The device that computes.
        rest_dtype: The element type of everything that is not quantized.
        num_threads: The number of CPU threads; `None` lets the engine choose.
        attention: The form of those attention products that the recipe leaves in float.
    """

    device: torch.device
    rest_dtype: torch.dtype = torch.float32
    num_threads: int | None = None
    attention: AttentionForm = "float"


class CompiledDenoiser(ABC):
    """A denoiser on an engine, whose calls take and return the same as those of the denoiser itself."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the denoiser. The output has the class that the denoiser returns, and `return_dict` has its effect.

        Floating-point arguments with two or more dimensions have the type `EngineOptions.rest_dtype`. An engine with
        files may be given float32 instead, and takes both.
        """

    @property
    @abstractmethod
    def layers(self) -> tuple[LayerExecution, ...]:
        """Returns how each layer runs, in the order of the denoiser's modules."""

    def keep_source(self, denoiser: nn.Module) -> None:
        """Offers the quantized denoiser in torch, from which an engine may convert calls that its graph does not fit.

        An engine whose graph fits all calls ignores it, so that its weights can be freed.
        """
        return None

    def set_strengths(self, strengths: Mapping[tuple[str, str], float]) -> None:
        """Sets the strengths of the adapters that the denoiser was compiled with; see `engines.adapters`.

        Raises:
            UsageError: The engine does not support adapters.
        """
        raise UsageError(
            "The engine runs the denoiser without adapters.", hint="edadm_cli.load(FOLDER, engine='torch')"
        )

    def parts(self) -> nn.Module:
        """Returns the denoiser that runs, as modules whose calls a step cache can skip one by one.

        Raises:
            UsageError: The engine runs each step as one graph.
        """
        raise UsageError(ONE_GRAPH)

    def record(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a part's `forward`, whose calls a step cache may skip, in the form that is quickest to call again."""
        return part

    @abstractmethod
    def profile(self, *args: Any, **kwargs: Any) -> list[OperationTime]:
        """Returns the time of each operation of one call, in execution order."""


class Engine(ABC):
    """One way to run quantized denoisers.

    Attributes:
        name: The name of the engine in commands.
        description: One line that describes the engine to users.
        device_types: The types of the devices that the engine runs on, such as `cpu`.
        layer_bound: The largest allowed error of one layer: the relative L2 distance to exact integer arithmetic on
            equal inputs, with `rest_dtype` float32. It covers the engine's way of rounding and scaling.
        takes_adapters: Whether the engine runs LoRA adapters beside the layers; see `engines.adapters`.
        attention_forms: The values of `EngineOptions.attention` that the engine supports.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]
    layer_bound: ClassVar[float]
    takes_adapters: ClassVar[bool] = False
    attention_forms: ClassVar[tuple[AttentionForm, ...]] = ("float",)

    @abstractmethod
    def refusal(self, device: torch.device) -> str | None:
        """Returns a sentence that says why the engine cannot run on `device` of this machine; `None` if it can."""

    @abstractmethod
    def layer_refusal(self, layer: QuantizedLayer) -> str | None:
        """Returns a clause that says why the engine cannot run a layer in integers; `None` if it can."""

    @abstractmethod
    def compile(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions
    ) -> CompiledDenoiser:
        """Compiles a quantized denoiser for this engine.

        Args:
            denoiser: A denoiser with quantized layers, on the CPU or on the engine's device. It is not changed.
            args: The positional arguments of an example call. Later calls may have other batch and image sizes.
            kwargs: The keyword arguments of the example call.
            options: The options of the engine.

        Raises:
            MachineError: The engine cannot run here; see `refusal`.
            EdadmError: The denoiser holds something that the engine cannot express.
        """

    @abstractmethod
    def compile_layer(self, layer: QuantizedLayer, x: Tensor, options: EngineOptions) -> Callable[[Tensor], Tensor]:
        """Compiles one quantized layer for this engine, for inputs with the shape of `x`."""

    def computed_call(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call that the engine computes in place of the given one, which has the same prediction.

        The two differ if the engine leaves out something that does not matter, such as tokens that a mask hides. The
        rates of `bench` count the multiply-accumulates of the call that is returned.

        Args:
            denoiser: The denoiser at full precision or quantized; only its class matters.
            args: The positional arguments of a call.
            kwargs: The keyword arguments of the call.
        """
        return args, kwargs

    def require(self, device: torch.device) -> None:
        """Checks that the engine can run on a device of this machine.

        Raises:
            MachineError: It cannot; the message is the sentence of `refusal`.
        """
        reason = self.refusal(device)
        if reason is not None:
            raise MachineError(reason, hint="edadm engines")

    def require_attention(self, form: AttentionForm) -> None:
        """Checks that the engine supports a form of attention.

        Raises:
            UsageError: The engine does not support it; the message names the form.
        """
        if form not in self.attention_forms:
            raise UsageError(
                f"The engine '{self.name}' computes attention in {' or '.join(self.attention_forms)}, not in {form}.",
                hint="leave out --attention, or use --engine cuda",
            )


class FileEngine(Engine):
    """An engine that keeps a converted denoiser in files, so that loading it needs no conversion.

    Attributes:
        files_format: The version of the files. It grows whenever files of earlier versions must be made again.
    """

    files_format: ClassVar[int] = 1

    @abstractmethod
    def save(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: EngineOptions, folder: Path
    ) -> None:
        """Writes the engine's files of a quantized denoiser to `folder`; see `compile` for the other arguments."""

    @abstractmethod
    def load(self, folder: Path, options: EngineOptions) -> CompiledDenoiser:
        """Loads a denoiser from the files that `save` wrote.

        Raises:
            InputError: The files are missing or broken, or have another version.
        """
