"""The memory of a GPU for rows: what this process may take and the work leaves; rows go to files beyond it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.models.gpu_memory import available_bytes
from edadm_cli.reconstruct import rows
from edadm_cli.reconstruct.call_signatures import probe_units
from edadm_cli.reconstruct.memory import fixed_budget, memory_left, working_bytes
from edadm_cli.reconstruct.rows import FileRows, MemoryRows, RowCache, RowType

GIB = 2**30
CARD = torch.device("cuda:0")


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of 100 GiB with the memory that others leave, this process's share, and what its allocator holds."""

    def make(free: float, share: float = 1.0, used: float = 0.0, reserved: float = 0.0) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (int(free * GIB), 100 * GIB))
        monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda device: share)
        monkeypatch.setattr(cuda, "memory_allocated", lambda device: int(used * GIB))
        monkeypatch.setattr(cuda, "memory_reserved", lambda device: int(reserved * GIB))

    return make


def test_a_share_of_the_card_bounds_what_is_available(a_card: Callable[..., None]) -> None:
    a_card(free=90)
    assert available_bytes(CARD) == 90 * GIB
    a_card(free=90, used=4, reserved=6)
    assert available_bytes(CARD) == 92 * GIB, "blocks without use are free"
    a_card(free=90, share=0.5, used=4, reserved=6)
    assert available_bytes(CARD) == 46 * GIB


def test_rows_get_what_the_work_leaves(a_card: Callable[..., None]) -> None:
    a_card(free=100, share=0.8)
    assert 0.9 * 60 * GIB < memory_left(CARD, 20 * GIB) <= 60 * GIB
    assert memory_left(CARD, 90 * GIB) == 20 * GIB, "forwards are halved before rows have no memory at all"
    assert fixed_budget(3, CARD) == 3 * 2**20
    assert fixed_budget(None, CARD) is None
    assert fixed_budget(None, torch.device("cpu")) == 4 * GIB


def test_the_work_is_the_largest_of_its_parts(make_setting: Callable[..., Any]) -> None:
    made = make_setting()
    context = made.context()
    forms = probe_units(made.denoiser, context.learning, made.batches)
    widest = max(kind.bytes for form in forms.values() for kind in (*form.inputs, *form.layers.values()))
    recipe = made.hyperparameters.model_copy(update={"batch_size": 1})
    evaluating = working_bytes(context, recipe, forms, 0)
    assert evaluating > 3 * made.batches.num_rows * widest
    assert working_bytes(context, recipe, forms, 10 * evaluating) > 10 * evaluating
    wide = recipe.model_copy(update={"batch_size": 40})
    assert working_bytes(context, wide, forms, 0) > 10 * 40 * widest


def test_rows_go_to_a_file_where_the_device_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(MemoryRows):
        def __init__(self, *_: Any) -> None:
            raise torch.OutOfMemoryError

    cache, kind = RowCache(tmp_path, 2**20, torch.device("cpu")), RowType((4,), torch.float32)
    monkeypatch.setattr(rows, "MemoryRows", Full)
    filed = cache.allocate(3, kind)
    assert isinstance(filed, FileRows)
    assert cache.used == 0
    assert cache.settle(filed, 2) is filed
    monkeypatch.undo()
    settled = cache.settle(filed, 2)
    assert settled.in_memory
    assert cache.used == settled.bytes
