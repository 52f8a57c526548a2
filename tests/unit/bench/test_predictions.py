"""The prediction of what is timed is near to exact integers, or as near to full precision as those are."""

from __future__ import annotations

import pytest
import torch

from edadm_cli.bench.quantized import Prepared, check_prediction
from edadm_cli.bench.spec import Spec
from edadm_cli.engines.parity import LayerParity
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.errors import EdadmError

FULL = torch.ones(100)
EXACT = FULL + 0.1 * torch.randn(100, generator=torch.Generator().manual_seed(0))


def prepared(fake_quantize_error: float) -> Prepared:
    spec = Spec("ours", "toy", "toy", "float32", "w8a8", True, None, 1.0)
    return Prepared(spec, LayerParity({}, {}, 0, EXACT), lambda: fake_quantize_error, None)


def test_operands_that_stay_in_floating_point_are_no_error() -> None:
    """At full precision, the prediction is off from exact integers by all that quantization costs."""
    parity = check_prediction(prepared(0.0), ReferenceEngine(), FULL, FULL)
    assert parity.quantization_rel_l2 / 2 < parity.prediction_rel_l2 <= parity.prediction_bound


def test_a_prediction_that_is_far_from_both_is_refused() -> None:
    with pytest.raises(EdadmError, match="its prediction is off by"):
        check_prediction(prepared(0.0), ReferenceEngine(), 2 * EXACT - FULL + 0.1, FULL)
