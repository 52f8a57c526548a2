"""The engine of docs/extending.md runs a denoiser in exact integers; `test_extending` has the other examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.engines.parity import compare_layers
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.quant.layers import quantized_layers
from tests.unit.engines.conftest import Call

PAGE = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
OPTIONS = EngineOptions(torch.device("cpu"))


def _engine_of_page() -> Engine:
    (program,) = [
        block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if "class MyEngine" in block
    ]
    names: dict[str, Any] = {}
    exec(compile(program, "extending.md", "exec"), names)
    engine: Engine = names["MyEngine"]()
    return engine


def test_the_engine_computes_exact_integers(quantized: nn.Module, call: Call) -> None:
    args, kwargs = call
    engine = _engine_of_page()
    assert engine.refusal(torch.device("cpu")) is None
    compiled = engine.compile(quantized, args, kwargs, OPTIONS)
    exact = ReferenceEngine().compile(quantized, args, kwargs, OPTIONS)
    assert torch.equal(compiled(*args, **kwargs)[0], exact(*args, **kwargs)[0])
    assert [(row.name, row.precision) for row in compiled.layers] == [(row.name, row.precision) for row in exact.layers]
    assert compiled.profile(*args, **kwargs)[0].milliseconds > 0
    parity = compare_layers(engine, quantized, args, kwargs, OPTIONS)
    assert parity.errors.keys() == quantized_layers(quantized).keys()
    assert max(parity.errors.values()) <= engine.layer_bound
    assert engine.refusal(torch.device("cuda"))
