"""The sentences that an export ends with."""

from __future__ import annotations

import torch

from edadm_cli.export.verdict import layers_by_width, verdict
from edadm_cli.quant.plan import QuantizationPlan

PLAN = QuantizationPlan.model_validate(
    {
        "layers": {
            "a": {"weight_bits": 8, "activation_bits": 8},
            "b": {"weight_bits": 4, "activation_bits": 8},
            "c": {"weight_bits": 4, "activation_bits": 8},
        },
        "kept": {"d": "excluded by the recipe"},
    }
)


def test_layers_are_counted_by_their_width() -> None:
    assert layers_by_width(PLAN) == {"w4a8": 2, "w8a8": 1, "float": 1}
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert verdict(images, PLAN) == ["Layers: 2 in W4A8, 1 in W8A8, 1 left in floating point."]


def test_black_and_flat_images_come_first() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    images[1] = 0
    assert verdict(images, PLAN)[0].startswith("1 of 2 sampled images are black")
    images[1] = 200
    assert verdict(images, PLAN)[0].startswith("1 of 2 sampled images are of one flat colour")
    images[0] = 0
    assert [sentence.partition(":")[0] for sentence in verdict(images, PLAN)[:2]] == [
        "1 of 2 sampled images are black",
        "1 of 2 sampled images are of one flat colour",
    ]
