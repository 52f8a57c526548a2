"""What an export contains besides the denoiser: every component of its source, also those that sampling skips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from edadm_cli.export.folder import write_pipeline
from edadm_cli.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checked(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion with a safety checker and its feature extractor."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path_factory.mktemp("checked") / "model"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**small, "vocab_size": 32}, vision_config=vision, projection_dim=16)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _export(source: Path, folder: Path) -> list[str]:
    model = load_model(str(source), CPU, torch.float32)
    left_out = write_pipeline(model, folder, {"unet": {}})
    config = folder / "unet/config.json"  # nothing is quantized here, so that diffusers loads it as it is
    content = json.loads(config.read_text())
    del content["quantization_config"]
    config.write_text(json.dumps(content))
    return left_out


def test_an_export_keeps_the_safety_checker_and_the_feature_extractor(checked: Path, tmp_path: Path) -> None:
    assert _export(checked, tmp_path / "export") == []
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (checked / name).read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert isinstance(pipeline.safety_checker, StableDiffusionSafetyChecker)
    assert pipeline.config.requires_safety_checker is True
    assert load_model(str(tmp_path / "export"), CPU, torch.float32).pipeline.safety_checker is None


@pytest.mark.parametrize("broken", ["safety_checker/model.safetensors", "feature_extractor"])
def test_a_checker_that_cannot_be_copied_is_left_out_by_name(checked: Path, tmp_path: Path, broken: str) -> None:
    source = Path(shutil.copytree(checked, tmp_path / "model"))
    path = source / broken
    shutil.rmtree(path) if path.is_dir() else path.rename(path.with_name("pytorch_model.bin"))
    left_out = _export(source, tmp_path / "export")
    assert any("'safety_checker'" in sentence for sentence in left_out)
    assert not (tmp_path / "export/safety_checker").exists()
    assert DiffusionPipeline.from_pretrained(tmp_path / "export").safety_checker is None


def test_an_export_of_a_pipeline_without_a_checker_stays_as_it_was(tiny_sd: Path, tmp_path: Path) -> None:
    assert _export(tiny_sd, tmp_path / "export") == []
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_no_path_that_a_component_was_once_loaded_from_is_in_an_export(tiny_sd: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    for name, key in (("vae/config", "_name_or_path"), ("text_encoder/config", "_name_or_path")):
        path = source / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: "/home/somebody/models"}))
    tokenizer = source / "tokenizer/tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"name_or_path": "/home/somebody/models"}))
    assert _export(source, tmp_path / "export") == []
    for path in (tmp_path / "export").rglob("*.json"):
        assert "somebody" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
