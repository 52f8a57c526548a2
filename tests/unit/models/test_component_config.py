"""Settings of components that no model has: the component and the field are named before any work is done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from edadm_cli.errors import EXIT_INPUT, InputError
from edadm_cli.models.loading import load_model
from edadm_cli.models.sources import component_config

CPU = torch.device("cpu")
UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
TEXT, TOKENIZER, INDEX = "text_encoder/config.json", "tokenizer/tokenizer_config.json", "model_index.json"


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def refusal(folder: Path) -> str:
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        load_model(str(folder), CPU, torch.float32)
    assert caught.value.exit_code == EXIT_INPUT
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1500
    assert time.process_time() - started < 10.0
    return caught.value.message


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "field", "values"),
    [
        (UNET, "sample_size", ["8", 0, -8, 8.5, True, [8, 0], 10**9, {}]),
        (UNET, "in_channels", ["4", 0, -4, 10**12]),
        (VAE, "sample_size", ["16", 0, -1]),
        (VAE, "scaling_factor", ["0.18", 0, -1, float("nan"), float("inf"), [], True]),
        (VAE, "shift_factor", ["a", float("nan")]),
        (SCHEDULER, "prediction_type", ["banana", 3, [], "v-prediction"]),
        (SCHEDULER, "num_train_timesteps", ["1000", 0, -1, 10**9]),
        (SCHEDULER, "beta_end", ["0.1", -1, 1e300, float("nan")]),
        (SCHEDULER, "timestep_spacing", ["wide", 1]),
        (SCHEDULER, "trained_betas", ["a", ["a"], [float("nan")]]),
        (TOKENIZER, "model_max_length", ["77", 0, -1, [], True]),
    ],
)
def test_a_field_of_another_type_or_range_is_named(model: Path, file: str, field: str, values: list[Any]) -> None:
    for value in values:
        edit(model / file, lambda content, value=value: content.update({field: value}))  # type: ignore[misc]
        message = refusal(model)
        assert f"'{field}'" in message
        assert file in message


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (UNET, {"layers_per_block": 100_000}),
        (UNET, {"transformer_layers_per_block": 100_000}),
        (UNET, {"block_out_channels": [8, 200_000]}),
        (UNET, {"down_block_types": ["DownBlock2D"] * 100_000, "block_out_channels": [8] * 100_000}),
        (TEXT, {"num_hidden_layers": 100_000}),
        (TEXT, {"hidden_size": 10**7, "intermediate_size": 10**7}),
        (TEXT, {"vocab_size": 2**31 - 1}),
        (TEXT, {"num_hidden_layers": 10**30}),
        (VAE, {"layers_per_block": 100_000}),
    ],
)
def test_a_network_far_larger_than_its_weights_is_not_built(model: Path, file: str, change: dict[str, Any]) -> None:
    edit(model / file, lambda content: content.update(change))
    assert file.partition("/")[0] in refusal(model)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_configurations_that_are_nested_deeply_are_refused(model: Path, depth: int) -> None:
    (model / UNET).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    assert UNET in refusal(model)
    (model / UNET).write_text('{"sample_size": ' + "9" * 5000 + "}")
    assert UNET in refusal(model)
    (model / UNET).write_text("[1]")
    assert UNET in refusal(model)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "TextToVideoSDPipeline"},
        {"_class_name": "StableVideoDiffusionPipeline"},
        {"_class_name": "FluxPipeline"},
        {"_class_name": "DDPMPipeline"},
        {"requires_aesthetics_score": 7, "_class_name": "StableDiffusionXLImg2ImgPipeline"},
        {"unet": ["diffusers", "AutoencoderKL"]},
        {"unet": []},
        {"unet": ["diffusers"]},
        {"_class_name": "ModelMixin"},
        {"_class_name": 7},
    ],
)
def test_an_index_that_does_not_fit_its_components_is_refused(model: Path, change: dict[str, Any]) -> None:
    edit(model / INDEX, lambda index: index.update(change))
    refusal(model)


def test_every_image_pipeline_of_diffusers_takes_the_denoiser_that_it_is_annotated_with() -> None:
    """The check by annotations refuses nothing that diffusers itself has put together."""
    checked = 0
    for name in dir(diffusers):
        pipeline = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not isinstance(pipeline, type) or not issubclass(pipeline, diffusers.DiffusionPipeline):
            continue
        for part in component_config.DENOISER_NAMES:
            hint = getattr(pipeline.__init__, "__annotations__", {}).get(part)
            cls = getattr(diffusers, hint, None) if isinstance(hint, str) else hint
            if isinstance(cls, type):
                component_config.require_fitting_classes(Path("index"), pipeline, {part: cls})
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("change", [{"model_max_length": 1000}, {"model_max_length": None}])
def test_a_tokenizer_that_gives_more_tokens_than_its_encoder_takes_is_refused(
    model: Path, change: dict[str, Any]
) -> None:
    edit(model / TOKENIZER, lambda content: content.update(change))
    assert "'model_max_length' of tokenizer" in refusal(model)
