"""Every operation of the namespace is a sound custom operation, by its kernel and by the reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import edadm_kernels
from edadm_kernels import backend, operation, pack

ROWS, TERMS, OUTPUTS = 5, 24, 6
SCALE, ZERO_POINT = torch.tensor([0.03]), torch.tensor([7], dtype=torch.int32)
INVERSE_GRID = (SCALE.reciprocal(), ZERO_POINT.float() - 128)
EPILOGUE = (torch.full((OUTPUTS,), 0.01), torch.arange(OUTPUTS, dtype=torch.int32), torch.ones(OUTPUTS))


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(len(shape))).to(torch.int8)


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def image(*shape: int) -> Tensor:
    return floats(*shape).contiguous(memory_format=torch.channels_last)


def cases() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation; layouts that a fake could get wrong."""
    weight = codes(OUTPUTS, 3, 3, TERMS)
    table = pack.conv_border_table(weight, 7, (1, 0, 1, 0))
    pixels = codes(2, TERMS, 4, 5).contiguous(memory_format=torch.channels_last)
    affine = (torch.ones(8), torch.zeros(8))
    two = (torch.tensor([0.03, 0.1]), torch.tensor([7, 128], dtype=torch.int32))
    columns = floats(2, ROWS, 3 * 16)
    return {
        "linear": (codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, floats(ROWS, OUTPUTS), torch.float16),
        "linear_gelu": (codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, SCALE, ZERO_POINT, 8),
        "linear_added": (
            codes(4, TERMS - 8), codes(OUTPUTS, TERMS), *EPILOGUE, floats(4, OUTPUTS),
            floats(2, 3 * OUTPUTS)[:, OUTPUTS:-OUTPUTS], codes(4, 8),
        ),
        "linear_to_codes": (
            codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, floats(ROWS, OUTPUTS), SCALE, ZERO_POINT, 8,
        ),
        "linears": (
            codes(ROWS, TERMS), [codes(OUTPUTS, TERMS)] * 2, [EPILOGUE[0]] * 2, [EPILOGUE[1]] * 2, [EPILOGUE[2], None],
            torch.float16,
        ),
        "linears_gelu": (
            codes(ROWS, TERMS), [codes(OUTPUTS, TERMS)] * 2, [EPILOGUE[0]] * 2, [EPILOGUE[1]] * 2, [EPILOGUE[2], None],
            SCALE, ZERO_POINT, 8, torch.float16,
        ),
        "linear_joined": (codes(ROWS, 8), codes(ROWS, TERMS - 8), codes(OUTPUTS, TERMS), *EPILOGUE, torch.float16),
        "join_heads": (
            columns, floats(2, ROWS, 4 * 16)[..., 16:], 2, [floats(24), floats(24)], 1e-6,
            torch.ones(2 * ROWS, 24), torch.ones(2 * ROWS, 24),
        ),
        "linear_stack": (
            codes(2, ROWS, TERMS), codes(2, OUTPUTS, TERMS), *(torch.stack([vector] * 2) for vector in EPILOGUE),
            torch.float16,
        ),
        "linear_geglu": (codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, SCALE, ZERO_POINT, 8),
        "linear_gelu_to_codes": (codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, *INVERSE_GRID, 8),
        "linear_geglu_to_codes": (codes(ROWS, TERMS), codes(OUTPUTS, TERMS), *EPILOGUE, *INVERSE_GRID, 8),
        "conv2d": (
            pixels, weight, EPILOGUE[0], table, EPILOGUE[2], floats(2, OUTPUTS), image(2, OUTPUTS, 2, 2),
            2, (1, 0, 1, 0), False, torch.float16,
        ),
        "group_norm": (image(2, 8, 3, 1), *affine, 2, 1e-5, True),
        "group_norm_quantize": (image(2, 5, 3, 3), *affine, 2, 1e-5, True, *two, 8, image(2, 3, 3, 3), True),
        "group_norm_to_codes": (
            image(2, 5, 3, 3), *affine, 2, 1e-5, True, SCALE.reciprocal(), SCALE * 0 - 4, 8, image(2, 3, 3, 3)
        ),
        "layer_norm_quantize": (floats(2, 3, 8), *affine, 1e-5, *two, 8),
        "modulated_norm_quantize": (
            floats(2, 4, 24), *floats(2, 48).split(24, dim=1), 1e-6, SCALE.reciprocal(), SCALE * 0 - 4, 8
        ),
        "attention_quantize": (*columns.split(16, dim=2), 2, 0.3, SCALE, ZERO_POINT, 8),
        "attend_int8": (*(x.unflatten(2, (2, 8)).transpose(1, 2) for x in columns.split(16, dim=2)), 0.3),
        "attend_on_grids": (
            *(x.unflatten(2, (2, 8)).transpose(1, 2) for x in columns.split(16, dim=2)),
            *(0.3, SCALE, SCALE, SCALE, SCALE / 8, 8, 8),
        ),
        "attend": (*(x.unflatten(2, (2, 8)).transpose(1, 2) for x in columns.split(16, dim=2)), 0.3),
        "attend_to_codes": (
            *(x.unflatten(2, (2, 8)).transpose(1, 2) for x in columns.split(16, dim=2)),
            *(0.3, [SCALE.reciprocal()] * 2, [SCALE * 0 - 4] * 2, [8, 4], 1, floats(2, 2, columns.shape[1])),
        ),
        "quantize_joined": (image(2, 5, 3, 3), image(2, 3, 3, 3), SCALE, ZERO_POINT, 8),
        "quantize": (image(2, 24, 3, 5)[:, 3:16], SCALE, ZERO_POINT, 8, True),
    }  # fmt: skip


def test_no_operation_is_left_out() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("edadm::")}
    assert {name.removeprefix("edadm::") for name in registered} == set(cases())


@pytest.mark.parametrize("name", list(cases()))
def test_the_kernel_is_a_sound_operation(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.edadm, name).default, cases()[name])


@pytest.mark.parametrize("name", list(cases()))
def test_the_reference_is_a_sound_operation(name: str) -> None:
    with backend("reference"):
        torch.library.opcheck(getattr(torch.ops.edadm, name).default, cases()[name])


@pytest.mark.parametrize("name", list(cases()))
def test_every_element_is_written(name: str) -> None:
    operation, arguments = getattr(torch.ops.edadm, name).default, cases()[name]
    expected = outputs(operation(*arguments))
    torch.use_deterministic_algorithms(True)  # torch fills what it allocates with NaN, or the largest integer
    try:
        assert torch.empty(3).isnan().all()
        actual = outputs(operation(*arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, list | tuple) else [result]


@pytest.mark.parametrize("name", ["linear", "linears", "conv2d"])
def test_an_eager_call_on_a_gpu_bypasses_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, call = cases()[name], getattr(edadm_kernels, name)
    expected = outputs(call(*arguments))
    monkeypatch.setattr(operation, "_is_eager", lambda x: True)
    with Recorded() as mode:
        actual = outputs(call(*arguments[:-1], **({} if name == "conv2d" else {"out_dtype": torch.float16})))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not any(name.startswith("edadm") for name in mode.names)


def test_a_mode_a_gradient_a_profiler_or_another_device_needs_the_dispatcher() -> None:
    with torch.no_grad():
        assert operation._is_unobserved()
        with Recorded():
            assert not operation._is_unobserved()
        with torch.profiler.profile():
            assert not operation._is_unobserved()
    with torch.enable_grad():
        assert not operation._is_unobserved()
    assert not operation._is_eager(torch.empty(1))
    with torch.no_grad(), Recorded() as mode:
        edadm_kernels.quantize(torch.empty(1), SCALE, ZERO_POINT)
    assert "edadm.quantize.default" in mode.names


class Recorded(TorchDispatchMode):
    """Notes the names of the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# The arguments of each operation that have one entry per sample, token or row.
BATCHED = {
    "linear": (0, 5),
    "linear_to_codes": (0, 5),
    "linear_joined": (0, 1),
    "linear_added": (0, 5, 7),
    "join_heads": (0, 1),
    "conv2d": (0, 5, 6),
    "group_norm_quantize": (0, 9),
    "group_norm_to_codes": (0, 9),
    "quantize_joined": (0, 1),
    "modulated_norm_quantize": (0, 1, 2),
    "attention_quantize": (0, 1, 2),
    "attend_int8": (0, 1, 2),
    "attend_on_grids": (0, 1, 2),
    "attend": (0, 1, 2),
    "attend_to_codes": (0, 1, 2, 8),
}


def emptied(name: str, tokens: bool) -> tuple[Any, ...]:
    """The arguments of an operation without samples, or of two samples without tokens (queries)."""
    arguments = list(cases()[name])
    if not tokens:
        axis = 1 if name == "linear_stack" else 0
        for place in BATCHED.get(name, (0,)):
            arguments[place] = arguments[place].narrow(axis, 0, 0)
        return tuple(arguments)
    axis = 2 if arguments[0].ndim == 4 else 1
    arguments[0] = arguments[0].narrow(axis, 0, 0)
    if name == "join_heads":
        arguments[1], arguments[5], arguments[6] = None, arguments[5][:0], arguments[6][:0]
        arguments[3] = arguments[3][:1]
    if name == "attend_to_codes":
        arguments[7] = 0
    return tuple(arguments)


WITHOUT_TOKENS = (
    *("join_heads", "layer_norm_quantize", "modulated_norm_quantize", "attention_quantize", "attend_int8"),
    *("attend_on_grids", "attend", "attend_to_codes", "quantize"),
)


@pytest.mark.parametrize(
    ("name", "of"), [*((name, "samples") for name in cases()), *((name, "tokens") for name in WITHOUT_TOKENS)]
)
def test_an_operation_on_nothing_returns_nothing(name: str, of: str) -> None:
    """Neither a kernel nor the reference can compute it, so both must be left out."""
    operation, arguments = getattr(torch.ops.edadm, name).default, emptied(name, of == "tokens")
    with FakeTensorMode() as mode:
        expected = outputs(operation(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments)))
    for chosen in (nullcontext(), backend("reference")):
        with chosen:
            actual = outputs(operation(*arguments))
        assert all(x.numel() == 0 for x in actual)
        assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize("name", ["attention_quantize", "attend_int8", "attend_on_grids", "attend", "attend_to_codes"])
def test_attention_without_keys_is_refused(name: str) -> None:
    arguments = list(cases()[name])
    axis = 1 if name == "attention_quantize" else 2
    arguments[1:3] = [x.narrow(axis, 0, 0) for x in arguments[1:3]]
    with pytest.raises(ValueError, match="at least one key"):
        getattr(torch.ops.edadm, name)(*arguments)


@pytest.mark.parametrize("name", ["linear", "linear_stack", "conv2d"])
def test_weights_without_rows_are_refused(name: str) -> None:
    arguments = list(cases()[name])
    arguments[1] = arguments[1].narrow(1 if name == "linear_stack" else 0, 0, 0)
    with pytest.raises(ValueError, match="weights with elements are expected"):
        getattr(torch.ops.edadm, name)(*arguments)


def test_all_queries_may_be_on_one_of_two_grids() -> None:
    arguments = list(cases()["attend_to_codes"])
    q, grid = arguments[0], [[tensors[1]] for tensors in arguments[4:7]]
    arguments[7] = 0
    nothing, codes_of_all = torch.ops.edadm.attend_to_codes(*arguments)
    (expected,) = torch.ops.edadm.attend_to_codes(*arguments[:4], *grid, 0, arguments[8])
    assert nothing.shape == (q.shape[0], 0, q.shape[1] * q.shape[3])
    assert torch.equal(codes_of_all, expected)


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_stack_of_spaced_operands_is_refused(place: int) -> None:
    """A kernel receives addresses alone, so it would read what lies between the operands."""
    arguments = list(cases()["linear_stack"])
    arguments[place] = torch.cat([arguments[place]] * 2, dim=-1)[..., : arguments[place].shape[-1]]
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.edadm.linear_stack(*arguments)


@pytest.mark.parametrize("name", ["linears", "linears_gelu"])
def test_an_input_without_layers_is_refused(name: str) -> None:
    arguments = [[] if isinstance(value, list) else value for value in cases()[name]]
    with pytest.raises(ValueError, match="at least one layer"):
        getattr(torch.ops.edadm, name)(*arguments)
