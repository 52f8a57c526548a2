"""Prepares a denoiser for tracing: a stand-in replaces every quantized layer, and all arguments become tensors.

A stand-in computes nothing while it is traced. Each engine replaces it in the graph with its own nodes, so integer
weights never become floating-point constants.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.engines.graph.interface import GraphInterface, class_path
from edadm_cli.errors import EdadmError, MachineError
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

IN_TORCH = "run the export in torch: edadm_cli.load(FOLDER, engine='torch')"
WRAPPED = "denoiser"
"""The attribute of `FlatDenoiser` that holds the denoiser. Tracing makes it a part of the names of nodes."""


@dataclass(eq=False)
class _Returned:
    """Holds the import path of the class that the denoiser returned, its number of tensors, and whether it is a list.

    These are not attributes of the module, because exporters undo what tracing sets on a module.
    """

    path: str | None = None
    count: int = 1
    is_list: bool = False


class FlatDenoiser(nn.Module):
    """A denoiser that takes the inputs of its graph one after another and returns its prediction.

    Args:
        denoiser: The denoiser with stand-ins.
        interface: It turns calls into inputs of the graph.
        context: Returns a context for the denoiser's computation, from the graph's inputs by name.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        interface: GraphInterface,
        context: Callable[[Mapping[str, Tensor]], AbstractContextManager[object]] = lambda _: nullcontext(),
    ) -> None:
        super().__init__()
        self.add_module(WRAPPED, denoiser)
        self.interface, self._context, self._returned = interface, context, _Returned()

    def forward(self, *tensors: Tensor) -> Tensor:
        """Returns the denoiser's prediction for the graph's inputs, in their order."""
        inputs = dict(zip(self.interface.inputs, tensors, strict=True))
        denoiser = self.get_submodule(WRAPPED)
        with self._context(inputs):
            # the interface omits None, which Kandinsky 2.2 passes for an argument without a default
            output = denoiser(**(dict.fromkeys(_required(denoiser)) | self.interface.call(inputs)))
        values = output.values() if isinstance(output, Mapping) else output
        self._returned.path, self._returned.count = class_path(output), sum(value is not None for value in values)
        prediction = output[0]
        self._returned.is_list = isinstance(prediction, list | tuple)
        return torch.stack(tuple(prediction)) if self._returned.is_list else prediction

    def traced_interface(self) -> GraphInterface:
        """Returns the interface, completed with what the denoiser returned while it was traced.

        Raises:
            EdadmError: The denoiser returned more than its prediction, such as a sound.
        """
        returned = self._returned
        if returned.count > 1:
            raise EdadmError(
                f"{self.interface.denoiser} predicts {returned.count} tensors at once, such as images and a sound, and"
                " the graph of an engine has one.",
                hint=IN_TORCH,
            )
        return self.interface.model_copy(update={"returns": returned.path, "returns_list": returned.is_list})


class LayerStandIn(nn.Module):
    """Takes the place of a quantized layer, with the attributes that other modules read from it.

    Args:
        layer: The quantized layer.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.operation, self.weight_shape = layer.operation, layer.weight_shape
        self.in_features = self.in_channels = layer.in_features
        self.out_features = self.out_channels = layer.out_features
        # some networks read the element type of the first parameter of an embedder (Wan)
        self.typed = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Stands for a weight, without values, for networks that read its element type (Z-Image)."""
        return torch.empty(self.weight_shape, device="meta")


def require_channel_factors(denoiser: nn.Module, engine: str) -> None:
    """Checks that a graph can express the transform of each layer's input: one factor per channel.

    Args:
        denoiser: A denoiser with quantized layers.
        engine: What makes the graph, for messages.

    Raises:
        MachineError: A layer has another transform, such as a rotation.
    """
    for name, layer in quantized_layers(denoiser).items():
        quantizer = layer.input_quantizer
        reason = None if quantizer is None else quantizer.factors_refusal
        if reason is not None:
            raise MachineError(
                f"{engine} cannot run the layer '{name}' of {type(denoiser).__name__}: {reason}.",
                hint="run the export in torch, without --engine, or use a recipe without this transform",
            )


def _required(denoiser: nn.Module) -> list[str]:
    """Returns the names of the arguments that a denoiser cannot be called without."""
    parameters = inspect.signature(denoiser.forward).parameters.values()
    return [each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]


def copy_with_stand_ins(denoiser: nn.Module, stand_ins: dict[int, Any]) -> nn.Module:
    """Returns a float32 copy of a denoiser on the CPU, which shares all tensors whose type and device allow it.

    Args:
        denoiser: The denoiser, which is not changed.
        stand_ins: The stand-in of each module or processor that is replaced, by the `id` of the latter.
    """
    memo = dict(stand_ins)
    # new parameters around the old storage: a cast of the copy must not reach the original
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in denoiser.parameters()}
    memo |= {id(b): b.detach() for b in denoiser.buffers()}
    # diffusers' own `to` refuses casts of quantized models
    return nn.Module.to(copy.deepcopy(denoiser, memo), "cpu", torch.float32).eval()


def sharing_copy(denoiser: nn.Module) -> nn.Module:
    """Returns a copy of a denoiser that shares its tensors, and keeps them when the denoiser is freed."""
    tensors: list[Any] = [*denoiser.parameters(), *denoiser.buffers()]
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})


def convolved_sizes(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """Returns the height and width of a convolution's output; the sizes may be symbols."""
    return [
        (size + 2 * pad - span * (width - 1) - 1) // step + 1
        for size, width, step, pad, span in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
