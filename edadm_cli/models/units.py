"""Determines which layers of a denoiser can be quantized, and in which units it is reconstructed.

Both follow from the modules and one traced forward; properties of an architecture come from its family.

References:
    EDA-DM, arXiv 2401.04585, section 4.2 (reconstruction units); Q-Diffusion, arXiv 2302.04304, section 4.3 (shortcuts
    whose input is a concatenation).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edadm_cli.hooks import Hooks
from edadm_cli.models.families import DenoiserFamily, UnitKind, family_of, outermost_blocks
from edadm_cli.models.families.attention import is_attention
from edadm_cli.models.families.layers import is_weighted


@dataclass(frozen=True)
class TracedLayer:
    """A convolution or linear layer that ran.

    Attributes:
        name: Its name in the denoiser.
        module: The layer.
        in_time_embedding: Whether it belongs to a module that embeds the timestep; see `DenoiserFamily.embeddings`.
        channel_parts: The channels of each tensor that was concatenated to its input; `None` for any other input.
    """

    name: str
    module: nn.Module
    in_time_embedding: bool
    channel_parts: tuple[int, ...] | None

    @property
    def weight(self) -> Tensor:
        """The full-precision weight; it is no parameter where it is read from disk when it is used."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


@dataclass(frozen=True)
class Unit:
    """A block or a single layer, which is reconstructed as one.

    Attributes:
        name: Its name in the denoiser.
        kind: What kind of block it is, or `layer`.
        module: The block or the layer.
        layers: The names of its layers that are quantized, in execution order.
        attentions: The names of its attention modules.
    """

    name: str
    kind: UnitKind
    module: nn.Module
    layers: tuple[str, ...]
    attentions: tuple[str, ...] = ()


@dataclass
class Trace:
    """One forward of a denoiser, in execution order.

    Attributes:
        layers: Convolutions and linear layers that ran once.
        attentions: Attention modules that ran, by name.
        not_run: Layers that did not run.
        repeated: Layers that ran more than once. Their calls have no single place in the order and no inputs in common,
            so they are neither quantized nor reconstructed (a DiT embeds the timestep again with its first block's
            layers).
        unsupported: Layers of a type that is not quantized, such as `Conv3d`: their type's name by their own.
        left_out: Layers whose calls cannot be recorded row by row, with the reason.
    """

    layers: list[TracedLayer] = field(default_factory=list)
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    unsupported: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the layers that ran, in order."""
        return [layer.name for layer in self.layers]


def trace(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Runs `denoiser(*args, **kwargs)` once and returns its trace: the layers that ran, in order."""
    modules, family = dict(denoiser.named_modules()), family_of(denoiser)
    names = {module: name for name, module in modules.items()}
    embeddings = tuple(f"{name}." for name, module in modules.items() if type(module).__name__ in family.embeddings)
    result, runs = Trace(), Counter[str]()

    def note_attention(attention: nn.Module, *_: Any) -> None:
        result.attentions[names[attention]] = attention

    with Hooks() as hooks:
        concatenated = hooks.enter_context(_Concatenations())

        def note_layer(layer: nn.Module, inputs: tuple[Any, ...], _: Tensor) -> None:
            name = names[layer]
            runs[name] += 1
            reason = _left_out(name, inputs, family)
            if reason is not None:
                result.left_out[name] = reason
                return
            parts = concatenated.sizes_of(inputs[0])
            result.layers.append(TracedLayer(name, layer, name.startswith(embeddings), parts))

        for module in modules.values():
            if isinstance(module, family.layer_types):
                hooks.after(module, note_layer)
            elif is_attention(module):
                hooks.after(module, note_attention)
        with torch.no_grad():
            denoiser(*args, **kwargs)
    result.repeated = tuple(sorted(name for name, count in runs.items() if count > 1))
    result.layers = [layer for layer in result.layers if layer.name not in result.repeated]
    for name, module in modules.items():
        if is_weighted(module) and not isinstance(module, family.layer_types):
            result.unsupported[name] = type(module).__name__
    supported = (name for name, module in modules.items() if is_weighted(module) and name not in result.unsupported)
    result.not_run = tuple(name for name in supported if name not in runs)
    return result


def units(denoiser: nn.Module, traced: Trace, names: set[str], granularity: Literal["block", "layer"]) -> list[Unit]:
    """Splits the layers in `names` into units, in execution order.

    Args:
        denoiser: The denoiser.
        traced: Its trace.
        names: The layers that are quantized.
        granularity: With `block`, each outermost block of the denoiser is one unit, and so is every layer outside of
            the blocks. With `layer`, every layer is a unit.
    """
    order = [layer.name for layer in traced.layers if layer.name in names]
    blocks = outermost_blocks(denoiser) if granularity == "block" else {}
    members: dict[str, list[str]] = {}
    for name in order:
        owner = next((block for block in blocks if name.startswith(block + ".")), name)
        members.setdefault(owner, []).append(name)
    result = []
    for owner, layers in members.items():
        module = denoiser.get_submodule(owner)
        attentions = tuple(name for name in traced.attentions if name == owner or name.startswith(owner + "."))
        result.append(Unit(owner, blocks.get(owner, "layer"), module, tuple(layers), attentions))
    return result


def _left_out(name: str, inputs: tuple[Any, ...], family: DenoiserFamily) -> str | None:
    """Returns why the calls of a layer cannot be recorded row by row; `None` where they can."""
    if not inputs:
        return "is called with its input as a keyword"
    if any(part in name for part in family.ragged_layers):
        return "multiplies tokens of all images at once, and their number differs from image to image"
    return None


class _Concatenations(TorchFunctionMode):
    """Remembers the tensors that `torch.cat` made along the channels, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat):
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim % result.dim() == 1 and result.dim() == 4:
                self._made.append((result, tuple(tensor.shape[1] for tensor in tensors)))
        return result

    def sizes_of(self, x: Tensor) -> tuple[int, ...] | None:
        """Returns the channel sizes of the tensors that were concatenated to `x`; `None` if `x` is no concatenation."""
        for made, sizes in self._made:
            if made.data_ptr() == x.data_ptr() and made.shape == x.shape:
                return sizes
        return None
