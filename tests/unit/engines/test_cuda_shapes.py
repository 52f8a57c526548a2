"""Blocks that torch compiles for many sizes of their inputs."""

from __future__ import annotations

from typing import Any

import torch

from edadm_cli.engines.cuda.compiled.plain import many_shapes


def test_a_function_is_compiled_for_more_shapes_than_torch_allows_and_the_limit_stays_torchs() -> None:
    dynamo: Any = torch._dynamo.config
    before = dynamo.recompile_limit
    double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True, dynamic=False)
    with many_shapes():
        for size in range(2, before + 4):
            assert double(torch.ones(size)).shape == (size,)
    assert dynamo.recompile_limit == before
