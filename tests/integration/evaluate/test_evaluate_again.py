"""An evaluation beside an earlier one: metrics are added, and stored images are checked before they are compared."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from edadm_cli.artifacts import RunFolder, save_tensors
from edadm_cli.artifacts.manifest import describe_payload, read_manifest, write_manifest
from edadm_cli.config import BitWidth, EvaluateConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.evaluate import stage

BITS = BitWidth(weight=4, activation=8)


def _config(**fields: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"bits": BITS, "num_images": 12, "batch_size": 5, "device": "cpu", **fields})


def test_metrics_are_added_to_an_evaluation_and_none_is_lost(text_run: RunFolder) -> None:
    stage.run(_config(metrics=("prompt_accuracy",)), text_run)
    assert stage.finished(_config(metrics=("frechet_distance",)), text_run) is None, "there is work to do"
    added = stage.run(_config(metrics=("frechet_distance",)), text_run)
    assert (added.status, set(added.metrics)) == ("done", {"frechet_distance", "prompt_accuracy"})
    for metrics in (("prompt_accuracy",), ("frechet_distance", "prompt_accuracy"), ("psnr_db",)):
        record = stage.run(_config(metrics=metrics), text_run)
        assert (record.status, record.identity) == ("up_to_date", added.identity)
    everything = stage.run(_config(), text_run)
    assert (everything.status, len(everything.metrics)) == ("done", 7)
    assert everything.metrics["prompt_accuracy"] == added.metrics["prompt_accuracy"]
    assert stage.run(_config(metrics=("recall",)), text_run).identity == everything.identity
    with pytest.raises(InputError, match="other settings"):
        stage.run(_config(metrics=("recall",), num_images=11), text_run)
    forced = stage.run(_config(metrics=("recall",)), text_run, force=True)
    assert set(forced.metrics) == {"recall"}


@pytest.mark.parametrize("engine", ["\0", "../x", ""])
def test_an_engine_with_an_impossible_name_is_refused_like_any_unknown_one(text_run: RunFolder, engine: str) -> None:
    with pytest.raises(UsageError, match="There is no engine"):
        stage.run(_config(engine=engine), text_run)


FOREIGN = {
    "no images": {"images": torch.zeros(5, 1, 256, dtype=torch.uint8), "latents": torch.zeros(5, 4, 4)},
    "no latents": {"images": torch.zeros(5, 1, 16, 16, dtype=torch.uint8), "latent": torch.zeros(5, 4, 4)},
    "no levels": {"images": torch.zeros(5, 1, 16, 16), "latents": torch.zeros(5, 4, 4)},
    "other shapes": {"images": torch.zeros(5, 1, 8, 32, dtype=torch.uint8), "latents": torch.zeros(5, 4)},
}


def test_full_precision_images_of_another_form_are_refused(text_run: RunFolder) -> None:
    stage.run(_config(), text_run)
    folder = text_run.path("evaluate", "full-precision")
    for name, crafted in FOREIGN.items():
        for index, count in enumerate((5, 5, 2)):
            path = folder / f"batch-{index:05d}.safetensors"
            save_tensors(path, {key: value[:count] for key, value in crafted.items()})
        manifest = read_manifest(folder)
        write_manifest(folder, manifest.model_copy(update={"payload": describe_payload(folder, ())}))
        with pytest.raises(InputError) as caught:
            stage.run(_config(), text_run, force=True)
        assert re.search(r"does not hold 5 images|have the shape", caught.value.message), f"{name}: {caught.value}"
