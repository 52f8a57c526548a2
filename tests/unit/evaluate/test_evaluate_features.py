"""Feature extractors under torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch_fidelity import FeatureExtractorInceptionV3

from edadm_cli.artifacts import load_tensors, save_tensors
from edadm_cli.errors import InputError
from edadm_cli.evaluate.digests import digits_digest
from edadm_cli.evaluate.features import digits_space, inception_space
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.metrics import fidelity
from edadm_cli.models.digits.classifier import DigitClassifier, load_classifier
from edadm_cli.models.digits.data import CLASSIFIER_FILE, model_folder
from tests.unit.evaluate.pickles import CreatesFile

CPU = torch.device("cpu")
ImageMaker = Callable[..., torch.Tensor]


def test_metrics_equal_those_of_torch_fidelity_end_to_end(
    random_classifier: DigitClassifier, random_images: ImageMaker
) -> None:
    space = digits_space(CPU)
    samples, real = ArrayImages(random_images(0, 1200)), ArrayImages(random_images(1, 1100))
    expected = torch_fidelity.calculate_metrics(
        input1=samples, input2=real, feature_extractor="digits", fid=True, kid=True, isc=True, prc=True,
        isc_splits=1, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    actual, other = space.extract(samples), space.extract(real)
    distance = fidelity.frechet_distance(
        fidelity.feature_statistics(actual.pooled), fidelity.feature_statistics(other.pooled)
    )
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-5)
    kernel = fidelity.kernel_distance(actual.pooled, other.pooled)
    assert kernel == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-2, abs=1e-5)
    assert fidelity.inception_score(actual.logits) == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    precision, recall = fidelity.precision_recall(actual.pooled, other.pooled)
    assert precision == pytest.approx(expected["precision"], abs=0.02)
    assert recall == pytest.approx(expected["recall"], abs=0.02)


def test_features_are_the_classifiers_own_in_the_order_of_the_images(
    random_classifier: DigitClassifier, random_images: ImageMaker
) -> None:
    images = random_images(2, 130)
    actual = digits_space(CPU).extract(ArrayImages(images))
    expected = random_classifier(images.expand(-1, 3, -1, -1).float() / 255)
    torch.testing.assert_close(actual.pooled, expected.features)
    torch.testing.assert_close(actual.spatial, expected.spatial.flatten(1))
    torch.testing.assert_close(actual.logits, expected.logits)


def test_the_digest_is_that_of_the_loaded_weights(tmp_path: Path) -> None:
    digest = sha256()
    for name, value in sorted(load_classifier().state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    assert digits_digest() == digest.hexdigest()
    path = tmp_path / "classifier" / CLASSIFIER_FILE
    path.parent.mkdir()
    tensors = load_tensors(model_folder("classifier") / CLASSIFIER_FILE)
    tensors["head.bias"][0] += 1e-2
    save_tensors(path, tensors)
    assert digits_digest(tmp_path) != digits_digest()


def test_inception_gives_its_own_features_and_seven_channels_of_the_17x17_map(
    inception_file: Path, random_images: ImageMaker
) -> None:
    images = ArrayImages(random_images(3, 3, size=24, channels=3))
    actual = inception_space(inception_file, CPU).extract(images)
    extractor = FeatureExtractorInceptionV3("original", ["2048", "logits_unbiased"], str(inception_file))
    with torch.no_grad():
        pooled, logits = extractor(images.images)
    torch.testing.assert_close(actual.pooled, pooled)
    torch.testing.assert_close(actual.logits, logits)
    assert actual.spatial.shape == (3, 7 * 17 * 17)
    assert not torch.equal(actual.spatial[0], actual.spatial[1])


def test_weights_that_are_missing_foreign_or_carry_code_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inception_space(tmp_path / "none.pth", CPU)
    foreign = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="does not hold"):
        inception_space(foreign, CPU)
    evil, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save(CreatesFile(trace), evil)
    with pytest.raises(InputError, match="tensors only"):
        inception_space(evil, CPU)
    assert not trace.exists()
    for content in (evil.read_bytes()[:40], b"hi\n", b"", b"(lp0\n", b"\x80\x02}q\x00."):
        evil.write_bytes(content)
        with pytest.raises(InputError, match=r"tensors only|does not hold"):
            inception_space(evil, CPU)


def test_offline_without_weights_names_the_file_and_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE") as caught:
        inception_space(None, CPU)
    assert "--inception-weights" in (caught.value.hint or "")
