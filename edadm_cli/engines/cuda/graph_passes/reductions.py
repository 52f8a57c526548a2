"""Makes torch keep a row in registers in the normalizations that it compiles, in place of reading it once per pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

WIDEST = 4096
"""The largest number of channels of a row that is kept in registers; torch's own limit is 1,024."""


def rows_in_registers() -> AbstractContextManager[object]:
    """Returns a context in which Inductor keeps the rows of its reductions in registers up to `WIDEST` channels."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if _is_row(features) and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST):
                return True
            return bool(InductorChoices.should_use_persistent_reduction(features, cooperative_reduction))

    context: AbstractContextManager[object] = V.set_choices_handler(Choices())
    return context


def _is_row(features: Any) -> bool:
    """Returns whether the elements that are reduced are contiguous in memory."""
    from torch._inductor.runtime.hints import ReductionHint

    return bool(features.get_reduction_hint() == ReductionHint.INNER)
