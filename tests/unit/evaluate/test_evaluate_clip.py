"""The CLIP score with a tiny model that open_clip knows during a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from edadm_cli.errors import InputError
from edadm_cli.metrics.clip_score import load_clip
from tests.unit.evaluate.pickles import CreatesFile

ImageMaker = Callable[..., torch.Tensor]
CPU = torch.device("cpu")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `tiny-clip` a model of open_clip and write random weights for it."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def test_the_score_is_the_cosine_of_the_two_embeddings(tiny_clip: Path, random_images: ImageMaker) -> None:
    scorer = load_clip("tiny-clip", str(tiny_clip), CPU)
    assert scorer.name == "tiny-clip/weights.pt"
    images, prompts = random_images(0, 3, size=32, channels=3), ["a seven", "two", "数字"]
    actual = scorer.score(images, prompts)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    with torch.no_grad():
        image_features = scorer.model.encode_image((images.float() / 255 - mean) / std)
        text_features = scorer.model.encode_text(open_clip.tokenize(prompts))
    expected = torch.nn.functional.cosine_similarity(image_features, text_features).double()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_models_and_weights_that_cannot_be_had_end_in_one_sentence(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no model 'no-such-model'"):
        load_clip("no-such-model", "openai", CPU)
    with pytest.raises(InputError, match="neither a file nor a tag"):
        load_clip("ViT-B-32", "no-such-tag", CPU)
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="do not fit"):
        load_clip("tiny-clip", str(foreign), CPU)
    trace = tmp_path / "trace"
    torch.save(CreatesFile(trace), foreign)
    with pytest.raises(InputError, match="do not fit"):
        load_clip("tiny-clip", str(foreign), CPU)
    assert not trace.exists()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_clip("ViT-B-32", "openai", CPU)


def _unreachable(*args: object, **kwargs: object) -> None:
    raise OSError("no network")
