"""The engine, the metric and the transform of docs/extending.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.parity import compare_layers
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.quant.layers import quantized_layers
from tests.unit.engines.conftest import Call

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"
OPTIONS = EngineOptions(torch.device("cpu"))


def _from_page(name: str) -> Any:
    """The class of a name, defined by one of the page's programs."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (program,) = [block for block in blocks if f"class {name}(" in block]
    names: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    return names[name]


def test_the_engine_computes_exact_integers(quantized: nn.Module, call: Call) -> None:
    args, kwargs = call
    engine = _from_page("MyEngine")()
    compiled = engine.compile(quantized, args, kwargs, OPTIONS)
    exact = ReferenceEngine().compile(quantized, args, kwargs, OPTIONS)
    assert torch.equal(compiled(*args, **kwargs)[0], exact(*args, **kwargs)[0])
    assert [(row.name, row.precision) for row in compiled.layers] == [(row.name, row.precision) for row in exact.layers]
    assert compiled.profile(*args, **kwargs)[0].milliseconds > 0
    parity = compare_layers(engine, quantized, args, kwargs, OPTIONS)
    assert parity.errors.keys() == quantized_layers(quantized).keys()
    assert max(parity.errors.values()) <= engine.layer_bound
    assert engine.refusal(torch.device("cuda"))


def test_the_metric_counts_each_image_once() -> None:
    batches = [(torch.full((3, 1, 4, 4), 10, dtype=torch.uint8), None), (torch.full((1, 1, 4, 4), 50), None)]

    class Images:
        def __len__(self) -> int:
            return 4

        def pairs(self) -> list[tuple[torch.Tensor, None]]:
            return batches

    value = _from_page("MeanLevel")().compute(SimpleNamespace(images=Images()), None)
    assert value.value == 20.0
    assert value.num_images == 4


def test_the_transform_keeps_the_product() -> None:
    transform = _from_page("Reverse")()
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    product = transform.apply(x, {}, -1) @ transform.fold(weight, {}).T
    torch.testing.assert_close(product, x @ weight.T)
