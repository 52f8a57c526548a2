"""Hooks live as long as the `with` block, also where it ends with an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edadm_cli.hooks import Hooks


def test_hooks_are_gone_after_the_block_whatever_happened_in_it() -> None:
    layer, seen = nn.Linear(2, 2), []
    with pytest.raises(KeyError), Hooks() as hooks:
        hooks.before(layer, lambda _, args, kwargs: seen.append(len(args) + len(kwargs)), with_kwargs=True)
        hooks.after(layer, lambda *_: torch.zeros(2))
        assert layer(torch.ones(2)).tolist() == [0, 0]
        raise KeyError
    layer(torch.ones(2))
    assert seen == [1]
