"""Rows that Inductor keeps in registers while the CUDA engine compiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from edadm_cli.engines.cuda.graph_passes.reductions import WIDEST, rows_in_registers


@pytest.mark.parametrize("channels", [1152, WIDEST])
def test_a_row_stays_in_registers_only_while_the_engine_compiles(channels: int) -> None:
    sizes = SimpleNamespace(
        statically_known_leq=lambda a, b: a <= b,
        statically_known_geq=lambda a, b: a >= b,
        statically_known_lt=lambda a, b: a < b,
    )
    row: Any = SimpleNamespace(
        reduction_numel=channels,
        get_reduction_hint=lambda: ReductionHint.INNER,
        strict_sum_rblock=lambda: None,
        has_strict_sum_multirow_reduction=lambda: False,
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):  # type: ignore[arg-type]
        assert not V.choices.should_use_persistent_reduction(row, False)
        with rows_in_registers():
            assert V.choices.should_use_persistent_reduction(row, False)
        assert not V.choices.should_use_persistent_reduction(row, False)
