"""Real images from a folder or a file of arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from edadm_cli.errors import EdadmError, InputError
from edadm_cli.evaluate import datasets
from edadm_cli.evaluate.real import open_real

ImageMaker = Callable[..., torch.Tensor]
Maker = Callable[[Path], str]


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
    actual = [images[index] for index in range(6)]  # type: ignore[arg-type]
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.uint8 for image in actual)
    assert actual[2][:, 0, 0].tolist() == [20, 0, 200]
    assert actual[5][:, 4, 4].tolist() == [77, 77, 77]


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
    assert both.layers == ("pooled",)
    assert both.statistics()["pooled"].mean.dtype == np.float64
    assert both.images is not None
    assert torch.equal(both.images((99, 99))[4], torch.from_numpy(images[4]).permute(2, 0, 1))
    np.savez(tmp_path / "statistics.npz", mu_s=np.zeros(3), sigma_s=np.eye(3), **pooled)
    statistics = open_real(str(tmp_path / "statistics.npz"))
    assert statistics.layers == ("pooled", "spatial")
    assert statistics.images is None


def _arrays(**arrays: Any) -> Maker:
    def make(folder: Path) -> str:
        np.savez(folder / "real.npz", **arrays)
        return str(folder / "real.npz")

    return make


def _patched_member(offsets: dict[int, bytes]) -> Maker:
    """An archive of images whose local and central headers are changed at byte offsets of the central one."""

    def make(folder: Path) -> str:
        np.savez(folder / "real.npz", arr_0=_IMAGES)
        data = bytearray((folder / "real.npz").read_bytes())
        local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
        for offset, value in offsets.items():
            data[central + offset : central + offset + len(value)] = value
            data[local + offset - 2 : local + offset - 2 + len(value)] = value
        (folder / "real.npz").write_bytes(data)
        return str(folder / "real.npz")

    return make


def _file(name: str, content: bytes) -> Maker:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def _pictures(last: bytes, name: str = "z.png") -> Maker:
    def make(folder: Path) -> str:
        _write_folder(folder / "real", 4)
        (folder / "real" / name).write_bytes(last)
        return str(folder / "real")

    return make


def _saved(save: Callable[[Any], object]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


def _text_bomb() -> bytes:
    """A PNG file whose compressed comment is far larger than Pillow reads."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK * 4), zip=True)
    return _saved(lambda stream: Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info))


def _without_area() -> bytes:
    bitmap = bytearray(_saved(lambda stream: Image.new("RGB", (8, 8)).save(stream, "BMP")))
    bitmap[18:22] = bytes(4)  # the width
    return bytes(bitmap)


_IMAGES = np.zeros((9, 8, 8, 3), np.uint8)
_NPY = _saved(lambda stream: np.save(stream, _IMAGES))
_COMMENT_BOMB = _text_bomb()


@pytest.mark.parametrize(
    ("make", "sentence", "code"),
    [
        (_arrays(other=np.zeros(3)), "holds neither", 3),
        (_arrays(mu=np.zeros(3), sigma=np.zeros((2, 2))), "were expected", 3),
        (_arrays(mu=np.zeros(0), sigma=np.zeros((0, 0))), "were expected", 3),
        (_arrays(mu=np.array(["a"]), sigma=np.eye(1)), "real numbers were expected", 3),
        (_arrays(mu=np.array([b"a"]), sigma=np.eye(1)), "real numbers were expected", 3),
        (_arrays(mu=np.zeros(1), sigma=np.zeros((1, 1), "V8")), "real numbers were expected", 3),
        (_arrays(mu=np.zeros(1, complex), sigma=np.eye(1)), "real numbers were expected", 3),
        (_arrays(mu=np.array([np.nan]), sigma=np.eye(1)), "not finite", 3),
        (_arrays(mu=np.array([{"code": 1}], dtype=object), sigma=np.eye(1)), "plain arrays", 3),
        (_arrays(arr_0=np.array([{"code": 1}], dtype=object)), "plain arrays", 3),
        (_arrays(arr_0=_IMAGES.astype(float)), "uint8", 3),
        (_arrays(arr_0=_IMAGES[..., 0]), "uint8", 3),
        (_arrays(arr_0=_IMAGES.astype("S3")), "uint8", 3),
        (_arrays(arr_0=_IMAGES[:, :0]), "uint8", 3),
        (_arrays(arr_0=_IMAGES[:2]), "more than 3", 3),
        (_patched_member({8: b"\1\0"}), "plain arrays", 3),  # encrypted
        (_patched_member({10: b"\x63\0"}), "plain arrays", 3),  # a compression that nobody has
        (_file("real.npy", _NPY), "plain arrays", 3),
        (_file("real.npz", _NPY), "plain arrays", 3),
        (_file("real.npz", _NPY.replace(b"(9, 8,", b"(10**9, 10**9,")), "plain arrays", 3),
        (_file("real.npz", b""), "plain arrays", 3),
        (_file("real.npz", b"no arrays"), "plain arrays", 3),
        (_pictures(b"\x89PNG no"), r"z\.png is not a readable image", 3),
        (_pictures(_COMMENT_BOMB), r"z\.png is not a readable image", 3),
        (_pictures(_without_area(), "z.bmp"), r"z\.bmp is", 3),
        (_pictures(b"no", os.fsdecode(b"\xff.png")), "is not a readable image", 3),
        (lambda folder: str(folder), "holds 0", 3),
        (lambda folder: str(folder / "none"), "no such folder or file", 3),
        (lambda folder: "", "empty text", 2),
        (lambda folder: " ", "empty text", 2),
        (lambda folder: "a" * 5000, "cannot be one", 2),
        (lambda folder: "~no-such-user/real", "cannot be one", 2),
        (lambda folder: "\ud800", "no such folder or file", 3),
    ],
)
def test_what_cannot_be_used_ends_in_one_sentence_before_anything_is_sampled(
    tmp_path: Path, make: Maker, sentence: str, code: int
) -> None:
    with pytest.raises(EdadmError, match=sentence) as caught:
        open_real(make(tmp_path)).fetch()
    assert caught.value.exit_code == code
    assert "\n" not in caught.value.message


def test_names_that_are_no_text_are_names_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"real-\xff")
    _write_folder(folder, 4)
    (folder / "3.png").rename(folder / os.fsdecode(b"\xfe.png"))
    real = open_real(str(folder))
    real.fetch()
    assert real.images is not None
    assert len(real.images((8, 8))) == 4  # type: ignore[arg-type]
    assert real.name == "4 images in real-\\xff"


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
    for offline, expected in (("1", "HF_HUB_OFFLINE forbids"), ("0", "cannot be downloaded: no network")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with pytest.raises(InputError, match=rf"cifar10-train .*{expected}") as caught:
            open_real("cifar10-train").fetch()
        assert "\n" not in caught.value.message
        assert caught.value.hint is not None
    with pytest.raises(InputError, match=r"nor a dataset of that name .*cifar10-train"):
        open_real("cifar11-train")


def _unreachable(*args: object) -> None:
    raise OSError("no\nnetwork")
