"""The digits models' image formats, captions, tokenizer and shipped files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.digits import data
from edadm_cli.models.digits.classifier import DigitClassifier, load_classifier
from edadm_cli.models.real_statistics import KINDS, pack

shipped = pytest.mark.skipif(
    not (data.WEIGHTS / "data" / data.STATISTICS_FILE).is_file(),
    reason="the weights are not in this checkout",
)


@pytest.mark.parametrize("num_prompts", [0, 1, 7, 10, 63, 240, 500])
def test_prompts_are_balanced_over_digits_and_captions(num_prompts: int) -> None:
    chosen = data.prompts(num_prompts, seed=3)
    assert len(chosen) == num_prompts
    labels = Counter(data.label_of_prompt(prompt) for prompt in chosen)
    assert None not in labels
    digits = [labels[digit] for digit in range(10)]
    assert max(digits) - min(digits) <= 1
    counts = Counter(chosen)
    for digit in range(10):
        used = [counts[caption] for caption in data.captions_of(digit)]
        assert max(used) - min(used) <= 1


def test_prompts_depend_on_the_seed_and_extend_each_other() -> None:
    assert data.prompts(35, seed=1) == data.prompts(90, seed=1)[:35]
    assert data.prompts(35, seed=1) != data.prompts(35, seed=2)
    with pytest.raises(UsageError):
        data.prompts(-1, seed=0)


@pytest.mark.parametrize("digit", range(10))
def test_every_caption_names_its_digit(digit: int) -> None:
    captions = data.captions_of(digit)
    assert len(set(captions)) == len(captions) == 2 * len(data.TEMPLATES)
    assert {data.label_of_prompt(caption) for caption in captions} == {digit}
    assert {data.label_of_prompt(caption.upper()) for caption in captions} == {digit}


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a handwritten SEVEN.", 7), ("seven, the digit 7", 7), ("digit_4", 4), ("", None),
        ("a cat", None),
        ("seventeen", None), ("17", None),
        ("three or four", None), ("a stone bone", None), ("one seven", None),
    ],
)  # fmt: skip
def test_label_of_prompt(prompt: str, label: int | None) -> None:
    assert data.label_of_prompt(prompt) == label


def test_image_formats() -> None:
    images = torch.randint(256, (3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    large, small = data.to_image_format(images, 32), data.to_image_format(images, 16)
    assert large.shape == (3, 1, 32, 32)
    assert large.dtype == small.dtype == torch.uint8
    assert torch.equal(large[:, 0, 2:-2, 2:-2], images)
    assert large.sum() == images.sum()  # the border is zero
    blocks = large.double().view(3, 1, 16, 2, 16, 2).mean(dim=(3, 5))
    assert small.shape == (3, 1, 16, 16)
    assert (small.double() - blocks).abs().max() <= 0.5
    with pytest.raises(UsageError, match="28"):
        data.to_image_format(images, 28)


def test_statistics_survive_packing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    statistics: dict[str, torch.Tensor] = {}
    for kind, size in zip(KINDS, (5, 7), strict=True):
        values = torch.randn(20, size, generator=generator, dtype=torch.float64)
        statistics |= {f"{kind}_mean": values.mean(dim=0), f"{kind}_cov": torch.cov(values.T)}
    (tmp_path / "data").mkdir()
    save_file(pack(statistics, "16."), tmp_path / "data" / data.STATISTICS_FILE)
    read = data.real_statistics(16, tmp_path)
    assert read.keys() == statistics.keys()
    for name, value in statistics.items():
        torch.testing.assert_close(read[name], value, rtol=1e-6, atol=1e-7)  # it ships in float32


def test_missing_files_name_the_training_command(tmp_path: Path) -> None:
    with pytest.raises(InputError) as failure:
        data.model_folder("digits-sd", tmp_path)
    assert "edadm_cli.models.digits.train" in (failure.value.hint or "")
    (tmp_path / "classifier").mkdir()
    with pytest.raises(InputError, match=r"classifier\.safetensors"):
        load_classifier("cpu", tmp_path)
    with pytest.raises(UsageError, match="digits-xl"):
        data.model_folder("digits-xl")


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 32, 32), (2, 1, 16, 16), (1, 3, 45, 31)])
def test_classifier_takes_gray_and_colour_of_any_size(shape: tuple[int, ...]) -> None:
    actual = DigitClassifier()(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    assert actual.features.shape == (shape[0], DigitClassifier.num_features)
    assert actual.spatial.shape == (shape[0], 4, 8, 8)
    assert actual.logits.shape == (shape[0], 10)


def test_classifier_reads_colour_as_gray_and_refuses_bytes() -> None:
    classifier = DigitClassifier()
    gray = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier(gray.expand(-1, 3, -1, -1)).logits, classifier(gray).logits)
    with pytest.raises(UsageError, match="uint8"):
        classifier((gray * 255).to(torch.uint8))


@shipped
def test_shipped_real_data_matches_the_classifier() -> None:
    images, labels = data.real_images(32), data.real_labels()
    assert images.shape == (10_000, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    with torch.inference_mode():
        actual = load_classifier()(images[:2000].float() / 255)
    assert (actual.logits.argmax(dim=1) == labels[:2000]).double().mean() > 0.985
    real = data.real_statistics(32)
    spread = real["features_cov"].diagonal().sqrt()
    assert ((actual.features.double().mean(dim=0) - real["features_mean"]).abs() < spread).all()
    assert torch.equal(real["spatial_cov"], real["spatial_cov"].T)
    assert torch.linalg.eigvalsh(real["features_cov"]).min() > -1e-6


@shipped
def test_shipped_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in data.WEIGHTS.rglob("*") if path.is_file()) < 11_500_000


@shipped
def test_shipped_pipeline_loads_into_one_dtype() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(data.model_folder("digits-sd"))
    dtypes = {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)}
    assert dtypes == {torch.float32}
