r"""Computes what OpenVINO does not translate with operations that it translates, while a denoiser is traced.

Rotary embeddings of several transformers (Z-Image, Lumina 2, AnyFlow) multiply complex numbers, and graphs hold real
numbers only. Within `TracedForms`, a `ComplexPair` of a real and an imaginary part stands for each complex tensor, and

    (a + bi)(c + di) = (ac - bd) + (ad + bc)i.

An operation on complex numbers without a known real form raises `ComplexOperationError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edadm_cli.engines.openvino.value_reads import READING, ValueReads

_REAL_TYPES = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""The element type of the parts of a complex tensor."""
_SHAPING = {"expand", "flatten", "movedim", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze"}
_JOINING = {"cat", "concat", "stack", "repeat", "repeat_interleave", "pad", "pad_sequence"}
_SPLITTING = {"chunk", "split", "split_with_sizes", "unbind"}
_CHOOSING = {"__getitem__", "gather", "index_select", "narrow", "select", "flip", "roll"}
_FILLING = {"zeros", "zeros_like", "empty", "empty_like", "new_zeros", "new_empty"}
_PART_BY_PART = (
    _SHAPING | _JOINING | _SPLITTING | _CHOOSING | _FILLING | {"clone", "contiguous", "detach", "to", "view"}
)
"""The functions that move, copy or make elements, and so apply to each part alone."""


class ComplexOperationError(NotImplementedError):
    """An operation on complex numbers has no known form in real numbers."""


class ComplexPair:
    """Stands for a complex tensor.

    Args:
        real: The real part.
        imag: The imaginary part, of the same shape.
    """

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @classmethod
    def of(cls, value: Any) -> ComplexPair:
        """Returns the pair of a complex constant, of a real tensor or number, or a pair itself."""
        if isinstance(value, ComplexPair):
            return value
        if isinstance(value, complex):
            return cls(torch.tensor(value.real), torch.tensor(value.imag))
        if not isinstance(value, Tensor):
            return cls(torch.as_tensor(value), torch.zeros(()))
        if not value.is_complex():
            return cls(value, torch.zeros_like(value))
        if torch.jit.is_tracing():  # NumPy hides the constant from the tracer, which would record a complex one
            array = value.detach().cpu().resolve_conj().numpy()
            return cls(*(torch.from_numpy(part.copy()).to(value.device) for part in (array.real, array.imag)))
        parts = torch.view_as_real(value.detach())
        return cls(parts[..., 0], parts[..., 1])

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes a function of torch that has a pair among its arguments."""
        return _in_real_numbers(function, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        """Returns the shape, which both parts have."""
        return self.real.shape

    @property
    def ndim(self) -> int:
        """Returns the number of dimensions."""
        return self.real.ndim

    @property
    def device(self) -> torch.device:
        """Returns the device of the parts."""
        return self.real.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the complex element type."""
        return next(kind for kind, real in _REAL_TYPES.items() if real == self.real.dtype)

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: Any) -> Any:
        return ComplexPair(self.real[index], self.imag[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = ComplexPair.of(value)
        self.real[index], self.imag[index] = parts.real, parts.imag

    def __mul__(self, other: Any) -> ComplexPair:
        return _product(self, other)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        function = getattr(Tensor, name)
        return lambda *args, **kwargs: _in_real_numbers(function, (self, *args), kwargs)


class TracedForms(TorchFunctionMode):
    """Returns a context in which functions that OpenVINO does not translate are computed with others.

    Args:
        reads: It collects the inputs whose values are read; see `value_reads`.
    """

    def __init__(self, reads: ValueReads | None = None) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Computes one function of torch."""
        kwargs = kwargs or {}
        if self._reads is not None and function.__name__ in READING:
            self._reads.note(function.__name__, args)
        if torch.jit.is_tracing() and not _is_complex(args):
            if function.__name__ == "__getitem__" and _is_mask(args[1]):
                return self._chosen(*args)
            if function.__name__ in ("__getitem__", "__setitem__") and isinstance(args[1], tuple):
                args = (args[0], self._without_masks(args[1]), *args[2:])
            forms: dict[str, Callable[..., Any]] = {"nonzero": self._nonzero, "repeat_interleave": self._repeated}
            function = forms.get(function.__name__, function)
        if _is_complex((args, kwargs)) or function.__name__ in ("view_as_complex", "polar", "complex"):
            return _in_real_numbers(function, args, kwargs)
        result = _SIMPLER.get(function.__name__, function)(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_complex() and function.__name__ != "__get__":
            raise ComplexOperationError(f"it computes complex numbers with {function.__name__}")
        return result

    def _chosen(self, tensor: Tensor, mask: Tensor) -> Any:
        """Returns the elements that a mask chooses, by their positions in the example.

        In a graph, a choice by a mask has no known size, and most of what follows it cannot be compiled.
        """
        (positions,) = self._positions(mask.flatten())
        return tensor.flatten(0, mask.ndim - 1).index_select(0, positions)

    def _without_masks(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns an index of several dimensions in which positions stand for each mask."""
        return tuple(part for item in index for part in (self._positions(item) if _is_mask(item) else (item,)))

    def _nonzero(self, tensor: Tensor, *, as_tuple: bool = False) -> Any:
        """Computes `torch.nonzero` with the positions in the example, whose number a graph would not know."""
        positions = self._positions(tensor)
        return positions if as_tuple else torch.stack(positions, dim=1)

    def _repeated(self, tensor: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
        """Computes `torch.repeat_interleave`, with the numbers of repetitions in the example if they differ.

        Args:
            tensor: What is repeated.
            repeats: One number, which may be a size in the trace, or one for each element of the dimension.
            dim: The dimension; `None` for all elements in one.
            output_size: The size that results, which is not needed here.
        """
        if dim is None:
            tensor, dim = tensor.flatten(), 0
        dim %= tensor.ndim
        if isinstance(repeats, Tensor) and repeats.ndim > 0 and len(repeats) > 1:
            numbers = self._values(repeats)
            return tensor.index_select(dim, torch.from_numpy(np.arange(len(numbers)).repeat(numbers)))
        each = repeats.reshape(()) if isinstance(repeats, Tensor) else repeats
        shape: list[Any] = [-1] * (tensor.ndim + 1)
        shape[dim + 1] = each
        return tensor.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)

    def _positions(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Returns the positions of what is not zero in the example, one tensor per dimension, as constants."""
        return tuple(map(torch.from_numpy, self._values(tensor).nonzero()))

    def _values(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor's values in the example, and notes that they were read. The tracer does not see NumPy."""
        if self._reads is not None:
            self._reads.note("nonzero", (tensor,))
        return tensor.detach().cpu().numpy()


def _is_mask(index: Any) -> bool:
    """Returns whether an index is a boolean tensor."""
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim > 0


def _is_complex(value: Any) -> bool:
    """Returns whether a nested argument holds complex numbers or their element type."""
    if isinstance(value, Mapping):
        return any(map(_is_complex, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_is_complex, value))
    if isinstance(value, Tensor):
        return value.is_complex()
    return isinstance(value, ComplexPair | complex) or (isinstance(value, torch.dtype) and value in _REAL_TYPES)


def _in_real_numbers(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes a function of torch whose arguments or result are complex."""
    name = function.__name__
    if name in ("__get__", "size", "dim", "numel"):  # facts about a constant
        return function(*args)
    if name == "view_as_complex":
        (parts,) = args
        return ComplexPair(parts[..., 0], parts[..., 1])
    if name == "view_as_real":
        pair = ComplexPair.of(args[0])
        return torch.stack([pair.real, pair.imag], dim=-1)
    if name == "polar":
        size, angle = args
        return ComplexPair(size * angle.cos(), size * angle.sin())
    if name == "complex":
        return ComplexPair(*args)
    if name in ("mul", "__mul__", "__rmul__", "multiply"):
        return _product(*args)
    if name == "conj":
        pair = ComplexPair.of(args[0])
        return ComplexPair(pair.real, -pair.imag)
    if name == "__setitem__":
        return args[0].__setitem__(*args[1:])
    if name == "is_complex":
        return True
    has_padding_value = bool(kwargs.get("value") or kwargs.get("padding_value"))  # it would belong to the real part
    if name not in _PART_BY_PART or has_padding_value:
        raise ComplexOperationError(f"it computes {name.strip('_')} of complex numbers")
    function = _SIMPLER.get(name, function)
    real, imag = (function(*_each_part(args, part), **_each_part(kwargs, part)) for part in ("real", "imag"))
    if isinstance(real, tuple | list):
        return type(real)(map(ComplexPair, real, imag))
    return ComplexPair(real, imag)


def _pad_sequence(
    sequences: Sequence[Tensor], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """Computes `torch.nn.utils.rnn.pad_sequence` with `pad` and `stack`."""
    longest = max(len(each) for each in sequences)
    rows = []
    for each in sequences:
        missing = longest - len(each)
        ends = (0, missing) if padding_side == "right" else (missing, 0)
        rows.append(F.pad(each, (0, 0) * (each.ndim - 1) + ends, value=padding_value) if missing else each)
    return torch.stack(rows, dim=0 if batch_first else 1)


def _masked_fill(tensor: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Computes `torch.masked_fill`, which the tracer does not know for a boolean value, with logical operations."""
    if not isinstance(value, bool):
        return tensor.masked_fill(mask, value)
    return tensor | mask if value else tensor & ~mask


_SIMPLER: dict[str, Callable[..., Any]] = {"pad_sequence": _pad_sequence, "masked_fill": _masked_fill}
"""Other forms of functions, by their names."""


def _product(first: Any, second: Any) -> ComplexPair:
    """Returns the product of two factors, of which at least one is complex."""
    a: Any = first if _is_real(first) else ComplexPair.of(first)
    b: Any = second if _is_real(second) else ComplexPair.of(second)
    if isinstance(a, ComplexPair) and isinstance(b, ComplexPair):
        return ComplexPair(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)
    pair, factor = (a, b) if isinstance(a, ComplexPair) else (b, a)
    return ComplexPair(pair.real * factor, pair.imag * factor)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and not value.is_complex())


def _each_part(value: Any, part: str) -> Any:
    """Returns nested arguments with the real or the imaginary part of each complex tensor, and real element types."""
    if isinstance(value, dict):
        return {key: _each_part(item, part) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each_part(item, part) for item in value)
    if isinstance(value, torch.dtype):
        return _REAL_TYPES.get(value, value)
    is_complex = isinstance(value, ComplexPair) or (isinstance(value, Tensor) and value.is_complex())
    return getattr(ComplexPair.of(value), part) if is_complex else value
