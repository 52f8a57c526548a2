"""Runs linear layers that read one tensor through equal quantizers with one quantization and one launch.

Which layers may share an input (queries, keys and values of an attention, and layers beside it) follows from the names
of their modules. In every call they share it if they are given the same tensor object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from edadm_cli.quant.layers import QuantizedLayer

Together = Callable[[Sequence[QuantizedLayer], Tensor], list[Tensor]]
"""A function that returns the outputs of several layers for one input."""

_SIBLINGS = (
    ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
)
_OF_CROSS_ATTENTION = (("to_k", "to_v"),)


@dataclass(eq=False)
class SharedInput:
    """Computes several layers when the first of them is called, and returns their outputs one by one.

    Attributes:
        layers: The layers, in any order.
        is_active: Whether their quantizers are equal, and all of them were called with the same input.
        source: The input whose outputs are held; `None` between calls.
        outputs: The number of output features of each layer.
        num_left: The number of layers that have not taken their output.
    """

    layers: tuple[QuantizedLayer, ...]
    is_active: bool = False
    source: Tensor | None = None
    outputs: list[Tensor | None] = field(default_factory=list)
    num_left: int = 0

    def renew(self) -> None:
        """Compares the quantizers again after they have been set or moved."""
        first = self.layers[0]
        self.is_active = all(_is_served(layer) and _equal_quantizers(first, layer) for layer in self.layers)
        self._release()

    def take(self, place: int, x: Tensor, together: Together) -> Tensor | None:
        """Returns the output of the layer at `place`; `None` if `x` is not the input that the other layers read."""
        if self.source is None:
            self.hold(x, together(self.layers, x))
        elif self.source is not x:
            self.is_active = False
            self._release()
            return None
        y = self.outputs[place]
        assert y is not None
        self.num_left -= 1
        if self.num_left == 0:
            self._release()
        return y

    def hold(self, source: Tensor, outputs: Sequence[Tensor | None]) -> None:
        """Keeps the outputs for `source` until each is taken; `None` stands for a layer that will not be called."""
        self.source, self.outputs = source, list(outputs)
        self.num_left = sum(y is not None for y in outputs)

    def _release(self) -> None:
        self.source, self.outputs, self.num_left = None, [], 0


@dataclass(frozen=True, eq=False)
class Member:
    """Holds a layer's place among the layers that share its input."""

    shared: SharedInput
    place: int


def share_inputs(model: nn.Module) -> None:
    """Groups the layers of a model that may share an input; each becomes a `member` of at most one group."""
    taken: set[int] = set()
    for parent in model.modules():
        for layers in _candidates(parent):
            if taken.isdisjoint(map(id, layers)):
                taken.update(map(id, layers))
                shared = SharedInput(layers)
                for place, layer in enumerate(layers):
                    layer.member = Member(shared, place)
                shared.renew()


def _candidates(parent: nn.Module) -> Iterator[tuple[QuantizedLayer, ...]]:
    for names in _OF_CROSS_ATTENTION if getattr(parent, "is_cross_attention", False) else _SIBLINGS:
        layers = tuple(layer for name in names if (layer := _descendant(parent, name)) is not None)
        if len(layers) == len(names):
            yield layers


def _descendant(parent: nn.Module, name: str) -> QuantizedLayer | None:
    module: nn.Module | None = parent
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    is_linear = isinstance(module, QuantizedLayer) and module.operation.kind == "linear"
    return module if is_linear else None  # type: ignore[return-value]


def _is_served(layer: QuantizedLayer) -> bool:
    return layer.product is not None and layer.product.runs(layer) and layer.weight_codes.device.type != "meta"


def _equal_quantizers(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    if a.transform is not None or b.transform is not None or a.plan.activation_bits != b.plan.activation_bits:
        return False
    of_a, of_b = ((float(layer.input_scale), int(layer.input_zero_point)) for layer in (a, b))
    return a.weight_shape[1] == b.weight_shape[1] and of_a == of_b
