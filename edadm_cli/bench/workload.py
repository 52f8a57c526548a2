"""Counts the products and the memory traffic of one call of a denoiser, layer by layer.

The counts come from one forward, which also works on the `meta` device.

A product is `batch` times `[M, K] x [K, N]`; a convolution is a product with `M = N_images * H_out * W_out` and
`K = C_in / groups * kh * kw`. The bytes are those that a layer with a fused epilogue has to read and write:

- fp16: input, weight, bias, output, two bytes each;
- W8A8: input and weight one byte (W4A8: half a byte per weight), bias, scale and correction four bytes per channel, the
  output two bytes, since norms, residuals and attention read it in half precision;
- a GEGLU projection writes `value * gelu(gate)`, half its channels, and in integers writes codes, since the second
  linear of the feed-forward reads codes;
- attention is one fused operation that reads q, k, v and writes o;
- a norm, with the activation behind it, writes codes where the network is quantized;
- a residual is read by the epilogue that adds it; a concatenation is copied;
- every other elementwise operation is fused into another one and moves no bytes, but it is listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_cli.hooks import Hooks
from edadm_cli.models.families.layers import ATTENTION, FEED_FORWARD, GATED_FEED_FORWARD, is_norm
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.operation import Operation

Form = Literal["fp16", "w8a8", "w4a8"]
FORMS: tuple[Form, ...] = ("fp16", "w8a8", "w4a8")
_WEIGHT_BYTES: dict[Form, float] = {"fp16": 2, "w8a8": 1, "w4a8": 0.5}
_HALF = 2
_CHANNEL_BYTES = 12  # bias, scale and zero-point correction, four bytes each
_PRODUCTS = ("bmm", "baddbmm")
_MOVES_NOTHING = ("_unsafe_view", "detach")


@dataclass(frozen=True)
class WorkItem:
    """One layer, attention or memory-bound operation of a call.

    Attributes:
        name: Dotted name of the module; elementwise operations add the operator's name.
        kind: `conv3x3` (any kernel size), `geglu`, `feed_forward`, `attention_projection`, `linear`, `self_attention`,
            `cross_attention`, `norm`, `residual`, `concatenation` or `elementwise`.
        m: Rows of the output, summed over the batch; queries for attention; 0 without a product.
        n: Columns of the output; keys for attention.
        k: Length of a sum; channels of a head for attention.
        batch: Products of this shape: groups of a convolution, images times heads for attention.
        macs: Multiply-accumulates.
        inputs: Elements read, without weights.
        weights: Elements of the weight.
        outputs: Elements written.
        is_integer: Whether it runs in integers in the quantized network.
    """

    name: str
    kind: str
    m: int
    n: int
    k: int
    batch: int
    macs: int
    inputs: int
    weights: int
    outputs: int
    is_integer: bool

    @property
    def shape(self) -> WorkItem:
        """Returns the item without its name, because equal shapes take equal time."""
        return replace(self, name="")

    def bytes_read(self, form: Form) -> float:
        """Returns the bytes that a call in `form` reads."""
        integer = self.is_integer and form != "fp16"
        activation = 1 if integer and self.kind != "norm" else _HALF
        weight = _WEIGHT_BYTES[form] if integer and self.kind != "norm" else _HALF
        channels = self.batch * self.n if self.weights and self.macs else 0
        per_channel = _CHANNEL_BYTES if integer else _HALF
        return self.inputs * activation + self.weights * weight + channels * per_channel

    def bytes_written(self, form: Form) -> float:
        """Returns the bytes that a call in `form` writes."""
        codes = self.is_integer and form != "fp16" and self.kind in ("geglu", "norm")
        return self.outputs * (1 if codes else _HALF)

    def bytes_moved(self, form: Form) -> float:
        """Returns the bytes that a call in `form` reads and writes."""
        return self.bytes_read(form) + self.bytes_written(form)


def workload(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, attention_in_integers: bool = False
) -> list[WorkItem]:
    """Returns the work of `denoiser(*args, **kwargs)`, in execution order.

    Args:
        denoiser: A denoiser at full precision or quantized, on any device; on `meta` nothing is computed or allocated.
            At full precision every convolution and linear layer counts as integer, otherwise the quantized ones do.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        attention_in_integers: Whether the attention products of a full-precision denoiser count as integer.
    """
    is_quantized = any(isinstance(module, QuantizedLayer) for module in denoiser.modules())
    observer = _Observer(is_quantized, attention_in_integers)
    with ExitStack() as stack:
        for name, module in denoiser.named_modules():
            stack.enter_context(observer.watching(name, module))
        stack.enter_context(_Elementwise(observer))
        stack.enter_context(_FusedAttention(observer))
        with torch.no_grad():
            denoiser(*args, **kwargs)
    return observer.items


def macs_by_kind(items: Iterable[WorkItem]) -> dict[str, int]:
    """Returns the multiply-accumulates of each kind that has any, the largest first."""
    total: Counter[str] = Counter()
    for item in items:
        total[item.kind] += item.macs
    return {kind: macs for kind, macs in total.most_common() if macs}


def unique_shapes(items: Iterable[WorkItem]) -> dict[WorkItem, int]:
    """Returns each shape with the number of its occurrences, in the order of first occurrence."""
    return dict(Counter(item.shape for item in items))


@dataclass
class _Products:
    """The two products of the attention that is running, which become one item when it ends."""

    name: str
    kind: str
    is_integer: bool
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)

    def item(self) -> WorkItem:
        batch, m, n, k = self.shapes[0]
        macs = sum(b * rows * columns * depth for b, rows, columns, depth in self.shapes)
        value = self.shapes[-1][2]  # p v: [M, N] x [N, channels of a value]
        inputs = batch * (m * k + n * k + n * value)
        return WorkItem(self.name, self.kind, m, n, k, batch, macs, inputs, 0, batch * m * value, self.is_integer)


class _Observer:
    """Collects items; inside a layer that is an item itself, nothing else is recorded."""

    def __init__(self, is_quantized: bool, attention_in_integers: bool) -> None:
        self.items: list[WorkItem] = []
        self.depth = 0
        self.attentions: list[_Products] = []
        self.modules: list[tuple[str, nn.Module]] = []
        self._is_quantized, self._attention_in_integers = is_quantized, attention_in_integers

    @contextmanager
    def watching(self, name: str, module: nn.Module) -> Iterator[None]:
        with Hooks() as hooks:
            hooks.before(module, self._enter(name), with_kwargs=True)
            hooks.after(module, self._leave(name))
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.modules.append((name, module))
            if _is_layer(module) or is_norm(module):
                self.depth += 1
            elif type(module).__name__ == ATTENTION:
                context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
                is_joint = getattr(module, "added_kv_proj_dim", None) is not None
                kind = "self_attention" if context is None or is_joint else "cross_attention"
                self.attentions.append(_Products(name, kind, self._attention_is_integer(module)))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if _is_layer(module):
                self.depth -= 1
                if self.depth == 0:
                    self.items.append(self._layer(name, module, inputs[0], output))
            elif is_norm(module):
                self.depth -= 1
                weights = sum(parameter.numel() for parameter in module.parameters())
                moved = inputs[0].numel()
                self.items.append(WorkItem(name, "norm", 0, 0, 0, 1, 0, moved, weights, output.numel(), True))
            elif type(module).__name__ == ATTENTION:
                products = self.attentions.pop()
                if products.shapes:
                    self.items.append(products.item())
            self.modules.pop()

        return hook

    def _layer(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> WorkItem:
        operation, shape, is_integer = _description(module)
        kind = self._layer_kind(operation, shape)
        k, n = torch.Size(shape[1:]).numel(), shape[0] // operation.groups
        m = y.numel() // shape[0]
        outputs = y.numel() // 2 if kind == "geglu" else y.numel()
        weights = torch.Size(shape).numel()
        planned = is_integer if self._is_quantized else True
        return WorkItem(
            name, kind, m, n, k, operation.groups, m * weights, x.numel(), weights, outputs, is_integer=planned
        )

    def _layer_kind(self, operation: Operation, shape: tuple[int, ...]) -> str:
        if operation.kind == "conv2d":
            return f"conv{shape[2]}x{shape[3]}"
        owners = [type(module).__name__ for _, module in self.modules]
        if GATED_FEED_FORWARD in owners:
            return "geglu"
        if FEED_FORWARD in owners:
            return "feed_forward"
        return "attention_projection" if ATTENTION in owners else "linear"

    def _attention_is_integer(self, module: nn.Module) -> bool:
        if not self._is_quantized:
            return self._attention_in_integers
        return isinstance(getattr(module, "processor", None), QuantizedAttention)

    def product(self, batch: int, m: int, n: int, k: int) -> None:
        """Records a product of two activations, as an item or as one of the two of an attention."""
        if self.attentions:
            self.attentions[-1].shapes.append((batch, m, n, k))
            return
        alone = _Products(self.modules[-1][0] if self.modules else "", "self_attention", False, [(batch, m, n, k)])
        self.items.append(alone.item())

    def elementwise(self, operator: str, operands: list[Tensor], result: Tensor) -> None:
        """Records an operation that moves memory; those of an attention belong to its fused operation."""
        if self.attentions:
            return
        name = ".".join(part for part in (self.modules[-1][0] if self.modules else "", operator) if part)
        inputs, outputs, kind = sum(operand.numel() for operand in operands), result.numel(), "elementwise"
        if operator == "cat" and result.dim() > 2:  # not the halves of a timestep's embedding
            kind = "concatenation"
        elif operator == "add" and [operand.shape for operand in operands] == [result.shape] * 2:
            kind, inputs, outputs = "residual", result.numel(), 0
        self.items.append(WorkItem(name, kind, 0, 0, 0, 1, 0, inputs, 0, outputs, False))


class _FusedAttention(TorchFunctionMode):
    """Records torch's fused attention as one operation and hides the operations inside it."""

    def __init__(self, observer: _Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        bound = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        q, k, v = (bound[name] for name in names)
        batch = q.shape[:-2].numel()
        self._observer.product(batch, q.shape[-2], k.shape[-2], q.shape[-1])
        self._observer.product(batch, q.shape[-2], v.shape[-1], k.shape[-2])
        self._observer.depth += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._observer.depth -= 1


class _Elementwise(TorchDispatchMode):
    """Records every operator that computes or copies; views move no memory."""

    def __init__(self, observer: _Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._observer.depth or func.is_view or not isinstance(result, Tensor):
            return result
        operator = func.overloadpacket.__name__
        tensors = [tensor for tensor in _flat(args) if isinstance(tensor, Tensor)]
        if operator in _PRODUCTS:
            left, right = tensors[-2:]
            self._observer.product(left.shape[0], left.shape[1], right.shape[2], left.shape[2])
        elif tensors and operator not in _MOVES_NOTHING:
            self._observer.elementwise(operator, tensors, result)
        return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer | nn.Linear | nn.Conv2d)


def _description(module: nn.Module) -> tuple[Operation, tuple[int, ...], bool]:
    if isinstance(module, QuantizedLayer):
        return module.operation, module.weight_shape, module.plan.input_grid is not None
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Operation.of(module), tuple(weight.shape), False
