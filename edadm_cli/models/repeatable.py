"""Makes computations on a GPU give the same bytes whenever they are repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Restricts cuDNN to deterministic algorithms while entered.

    With other algorithms the order of a sum may differ from call to call, and a sum that lies between two codes gives
    one or the other.
    """
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
