"""Real images from a folder or a file of arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edadm_cli.errors import InputError
from edadm_cli.evaluate import datasets
from edadm_cli.evaluate.real import open_real

ImageMaker = Callable[..., torch.Tensor]


def _write_folder(folder: Path, count: int, size: tuple[int, int] = (20, 30)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (size[1], size[0]), (index * 10, 0, 200)).save(folder / f"{index}.png")


def test_image_files_of_any_size_are_brought_to_the_size_of_the_samples(tmp_path: Path) -> None:
    _write_folder(tmp_path / "real" / "more", 5)
    Image.new("L", (64, 16), 77).save(tmp_path / "real" / "wide-and-gray.jpg", quality=100)
    (tmp_path / "real" / "notes.txt").write_text("no image")
    real = open_real(str(tmp_path / "real"))
    assert real.images is not None
    images = real.images((8, 8))
    found = [images[index] for index in range(6)]  # type: ignore[arg-type]
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.uint8 for image in found)
    assert found[2][:, 0, 0].tolist() == [20, 0, 200]
    assert found[5][:, 4, 4].tolist() == [77, 77, 77]


def test_the_digest_follows_names_and_content(tmp_path: Path) -> None:
    _write_folder(tmp_path / "a", 5)
    _write_folder(tmp_path / "b", 5)
    assert open_real(str(tmp_path / "a")).digest == open_real(str(tmp_path / "b")).digest
    (tmp_path / "b" / "0.png").write_bytes((tmp_path / "b" / "1.png").read_bytes())
    assert open_real(str(tmp_path / "a")).digest != open_real(str(tmp_path / "b")).digest


def test_arrays_give_statistics_or_images_or_both(tmp_path: Path, random_images: ImageMaker) -> None:
    images = random_images(0, 6, channels=3).permute(0, 2, 3, 1).numpy()
    pooled = {"mu": np.zeros(5, np.float32), "sigma": np.eye(5)}
    np.savez(tmp_path / "both.npz", arr_0=images, arr_1=np.arange(6), **pooled)
    both = open_real(str(tmp_path / "both.npz"))
    assert set(both.statistics) == {"pooled"}
    assert both.statistics["pooled"].mean.dtype == np.float64
    assert both.images is not None
    assert torch.equal(both.images((99, 99))[4], torch.from_numpy(images[4]).permute(2, 0, 1))
    np.savez(tmp_path / "statistics.npz", mu_s=np.zeros(3), sigma_s=np.eye(3), **pooled)
    statistics = open_real(str(tmp_path / "statistics.npz"))
    assert set(statistics.statistics) == {"pooled", "spatial"}
    assert statistics.images is None


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"other": np.zeros(3)}, "holds neither"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "were wanted"),
        ({"arr_0": np.zeros((9, 8, 8, 3))}, "uint8"),
        ({"arr_0": np.zeros((9, 8, 8), np.uint8)}, "uint8"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "more than 3"),
        ({"mu": np.array([{"code": 1}], dtype=object), "sigma": np.zeros((1, 1))}, "plain arrays"),
    ],
)
def test_unusable_arrays_end_in_one_sentence(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        open_real(str(tmp_path / "real.npz"))


def test_missing_empty_and_broken_places_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or file"):
        open_real(str(tmp_path / "none"))
    _write_folder(tmp_path / "few", 3)
    with pytest.raises(InputError, match="3 images"):
        open_real(str(tmp_path / "few"))
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(InputError, match="npz"):
        open_real(str(tmp_path / "text.npz"))
    _write_folder(tmp_path / "broken", 5)
    (tmp_path / "broken" / "3.png").write_bytes(b"\x89PNG no")
    real = open_real(str(tmp_path / "broken"))
    assert real.images is not None
    with pytest.raises(InputError, match=r"3\.png is not a readable image"):
        real.images((8, 8))[3]


def test_a_dataset_of_torch_fidelity_is_opened_by_its_name(
    tmp_path: Path, random_images: ImageMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "datasets_folder", lambda: tmp_path / "datasets")
    opened: list[tuple[str, bool]] = []

    def create(root: str, download: bool) -> torch.Tensor:
        opened.append((root, download))
        if not download and not Path(root).exists():
            raise RuntimeError("Dataset not found or corrupted.")
        return random_images(0, 5, channels=3)

    monkeypatch.setitem(datasets.DATASETS_REGISTRY, "tiny", create)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    real = open_real("tiny")
    assert opened == [], "an evaluation that is up to date does not need it"
    real.fetch()
    assert [download for _, download in opened] == [False, True]
    assert real.images is not None
    same, smaller = real.images((16, 16)), real.images((8, 8))
    assert torch.equal(same[4], random_images(0, 5, channels=3)[4])
    assert smaller[4].shape == (3, 8, 8)
    assert len(smaller) == 5  # type: ignore[arg-type]
    assert len(opened) == 2, "it is opened once"
    assert real.digest != open_real("cifar10-val").digest


def test_a_dataset_that_cannot_be_had_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "datasets_folder", lambda: tmp_path / "datasets")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", _unreachable)
    for offline, wanted in (("1", "HF_HUB_OFFLINE forbids"), ("0", "cannot be downloaded: no network")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with pytest.raises(InputError, match=rf"cifar10-train .*{wanted}") as caught:
            open_real("cifar10-train").fetch()
        assert "\n" not in caught.value.message
        assert caught.value.hint is not None
    with pytest.raises(InputError, match=r"nor a dataset of that name .*cifar10-train"):
        open_real("cifar11-train")


def _unreachable(*args: object) -> None:
    raise OSError("no\nnetwork")
