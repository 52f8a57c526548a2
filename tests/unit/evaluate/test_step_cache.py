"""An evaluation with a step cache: what its verdict says, and what is refused before anything is sampled."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from edadm_cli.artifacts import OneStepError
from edadm_cli.config import BitWidth, EvaluateConfig
from edadm_cli.errors import UsageError
from edadm_cli.evaluate.images import SampledImages
from edadm_cli.evaluate.request import SamplingPlan, require_machine
from edadm_cli.evaluate.verdict import verdict


class Images(list[Any]):
    plan = SamplingPlan(seeds=(0,), prompts=None, num_steps=2, guidance_scale=None, batch_size=1)

    def pairs(self) -> list[tuple[Any, Any]]:
        return [(image, image) for image in self]


def test_the_one_step_error_is_that_without_the_cache() -> None:
    images = cast(SampledImages, Images([torch.arange(12).reshape(3, 2, 2) * 9]))
    error = OneStepError(
        num_images=1, rel_l2=0.1, guided_rel_l2=None, by_step=(0.1,), guided_by_step=(), growth=(0.0, 0.2)
    )
    plain = verdict(images, images, error)
    cached = verdict(images, images, error, "taylorseer:2")
    assert cached[:-1] == plain
    assert "without the cache taylorseer:2" in cached[-1]
    assert verdict(images, images, None, "taylorseer:2") == verdict(images, images, None)


def test_a_sampler_with_more_calls_than_steps_has_the_steps_that_were_asked_for() -> None:
    images = cast(SampledImages, Images([torch.arange(12).reshape(3, 2, 2) * 9]))
    error = OneStepError(
        num_images=1, rel_l2=0.1, guided_rel_l2=None, by_step=(0.1,) * 3, guided_by_step=(), growth=(0.0, 0.1, 0.2)
    )  # PNDM calls the denoiser twice in its second step
    assert "before the last of 2 steps the trajectories are 0.2 apart" in verdict(images, images, error)[-1]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_with_files_refuses_a_cache_at_once(engine: str) -> None:
    pytest.importorskip(engine)
    config = EvaluateConfig(bits=BitWidth.parse("w8a8"), engine=engine, cache="taylorseer:2", device="cpu")
    with pytest.raises(UsageError, match="one graph"):
        require_machine(config)
