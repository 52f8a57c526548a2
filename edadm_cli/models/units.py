"""Where a denoiser is quantized, and in which pieces it is reconstructed: found by walking the modules and by tracing
one forward, so that no list of layer names is written down for any model.

References:
    EDA-DM, arXiv 2401.04585, section 4.2 (reconstruction units); Q-Diffusion, arXiv 2302.04304, section 4.3 (shortcuts
    whose input is a concatenation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

UnitKind = Literal["residual", "transformer", "attention", "layer"]

# Blocks of diffusers that are reconstructed as one: class name -> kind.
BLOCKS: dict[str, UnitKind] = {
    "ResnetBlock2D": "residual",
    "ResnetBlockCondNorm2D": "residual",
    "BasicTransformerBlock": "transformer",
    "JointTransformerBlock": "transformer",
    "FluxTransformerBlock": "transformer",
    "FluxSingleTransformerBlock": "transformer",
    "Attention": "attention",
}
# Modules that embed the timestep and other per-image vectors; their layers count as the network's edge.
_EMBEDDINGS = ("TimestepEmbedding", "CombinedTimestepLabelEmbeddings", "CombinedTimestepTextProjEmbeddings")
_LAYER_TYPES = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class TracedLayer:
    """A convolution or linear layer that ran."""

    name: str
    module: nn.Module
    in_time_embedding: bool
    channel_parts: tuple[int, ...] | None


@dataclass(frozen=True)
class Unit:
    """What is reconstructed at once: a block, or a layer of its own."""

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
    """

    layers: list[TracedLayer] = field(default_factory=list)
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    not_run: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the layers that ran, in order."""
        return [layer.name for layer in self.layers]


def trace(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run `denoiser(*args, **kwargs)` once and note what ran, in order."""
    result, runs = Trace(), dict[str, int]()
    embeddings = [name for name, module in denoiser.named_modules() if type(module).__name__ in _EMBEDDINGS]
    with ExitStack() as stack:
        concatenated = stack.enter_context(_Concatenations())

        def note(name: str, module: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                runs[name] = runs.get(name, 0) + 1
                x = inputs[0]
                parts = concatenated.sizes_of(x)
                embedded = any(name.startswith(prefix + ".") for prefix in embeddings)
                result.layers.append(TracedLayer(name, module, embedded, parts))

            return hook

        def note_attention(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, *_: Any) -> None:
                result.attentions[name] = module

            return hook

        for name, module in denoiser.named_modules():
            if isinstance(module, _LAYER_TYPES):
                stack.enter_context(_removed(module.register_forward_hook(note(name, module))))
            elif _is_attention(module):
                stack.enter_context(_removed(module.register_forward_hook(note_attention(name))))
        with torch.no_grad():
            denoiser(*args, **kwargs)
    result.repeated = tuple(sorted(name for name, count in runs.items() if count > 1))
    result.layers = [layer for layer in result.layers if layer.name not in result.repeated]
    walked = [name for name, module in denoiser.named_modules() if isinstance(module, _LAYER_TYPES)]
    result.not_run = tuple(name for name in walked if name not in runs)
    return result


def units(denoiser: nn.Module, traced: Trace, names: set[str], granularity: Literal["block", "layer"]) -> list[Unit]:
    """Split the layers in `names` into units, in execution order.

    With `block`, the outermost module of a class in `BLOCKS` is a unit and every other layer is one of its own; with
    `layer`, every layer is.
    """
    order = [layer.name for layer in traced.layers if layer.name in names]
    blocks = _outermost_blocks(denoiser) if granularity == "block" else {}
    found: dict[str, list[str]] = {}
    for name in order:
        owner = next((block for block in blocks if name.startswith(block + ".")), name)
        found.setdefault(owner, []).append(name)
    result = []
    for owner, layers in found.items():
        module = denoiser.get_submodule(owner)
        attentions = tuple(name for name in traced.attentions if name == owner or name.startswith(owner + "."))
        result.append(Unit(owner, blocks.get(owner, "layer"), module, tuple(layers), attentions))
    return result


def _outermost_blocks(denoiser: nn.Module) -> dict[str, UnitKind]:
    blocks: dict[str, UnitKind] = {}
    for name, module in denoiser.named_modules():  # parents come before their children
        kind = BLOCKS.get(type(module).__name__)
        if kind is not None and not any(name.startswith(block + ".") for block in blocks):
            blocks[name] = kind
    return blocks


def _is_attention(module: nn.Module) -> bool:
    """Whether a module computes attention, by whatever processor: not all of diffusers' are of one class."""
    return hasattr(module, "set_processor") and hasattr(module, "processor")


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
        """Channel sizes of the tensors that were concatenated to `x`; `None` when `x` is no concatenation."""
        for made, sizes in self._made:
            if made.data_ptr() == x.data_ptr() and made.shape == x.shape:
                return sizes
        return None


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
