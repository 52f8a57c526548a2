"""Files written piece by piece are the files that are written streamed, and their parts are read alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edadm_cli.artifacts import TensorInfo, load_tensors, save_tensors
from edadm_cli.artifacts.streaming import Streamed, TensorFile, joined, read_slice, slices, stream_tensors, streamed
from edadm_cli.errors import InputError

TENSORS = {
    "features": torch.arange(60.0).reshape(3, 5, 4),
    "timesteps": torch.tensor([3, 2, 1]),
    "half": torch.arange(6).half().reshape(2, 3),
    "brain": torch.arange(5).bfloat16(),
    "flags": torch.tensor([True, False]),
    "codes": torch.tensor([-8, 7], dtype=torch.int8),
    "nothing": torch.zeros(0, 4),
}


def test_a_streamed_file_is_byte_for_byte_the_file_written_whole(tmp_path: Path) -> None:
    save_tensors(tmp_path / "whole", TENSORS)
    stream_tensors(tmp_path / "streamed", {name: streamed(tensor) for name, tensor in TENSORS.items()})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_joined_along_a_dimension(tmp_path: Path, dim: int) -> None:
    parts = list(torch.randn(4, 6, 3, 2).split([1, 2, 1] if dim == 0 else [1, 2, 3], dim=dim))
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, part in zip(paths, parts, strict=True):
        save_tensors(path, {"x": part, "other": torch.zeros(1)})
    stream_tensors(tmp_path / "joined", {"x": joined(paths, "x", dim), "n": streamed(torch.tensor(7))})
    actual = load_tensors(tmp_path / "joined")
    assert torch.equal(actual["x"], torch.cat(parts, dim=dim))
    assert actual["n"] == 7


def test_slices_are_the_tensor_in_order(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, TENSORS)
    actual = list(slices(path, "features", 1, 2))
    assert [piece.shape[1] for piece in actual] == [2, 2, 1]
    assert torch.equal(torch.cat(actual, dim=1), TENSORS["features"])
    assert torch.equal(read_slice(path, "features", (slice(1, 2),)), TENSORS["features"][1:2])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_slice(path, "absent", (slice(0, 1),))


def test_tensors_are_read_when_asked_for_and_the_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header has as many lines as tensors: read for each of them, it would take hours for a large model."""
    path = tmp_path / "file"
    save_tensors(path, TENSORS)
    file = TensorFile(path)
    monkeypatch.setattr("edadm_cli.artifacts.tensors.parse_json", lambda *_: pytest.fail("the header is read again"))
    assert set(file) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)
    with pytest.raises(KeyError):
        file["absent"]


@pytest.mark.parametrize("change", ["shorter", "rewritten", "replaced"])
def test_a_file_that_is_no_longer_the_one_that_was_opened_is_refused(tmp_path: Path, change: str) -> None:
    """The header says where tensors lie: in another file, other bytes are there."""
    path, other = tmp_path / "file", tmp_path / "other"
    save_tensors(path, TENSORS)
    save_tensors(other, {name: tensor.flip(0) for name, tensor in TENSORS.items()})
    os.utime(path, ns=(1, 1))
    file = TensorFile(path)
    content = other.read_bytes() if change == "rewritten" else path.read_bytes()[:-1]
    if change == "replaced":
        other.replace(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="was changed or replaced while its tensors were being read") as caught:
        file["features"]
    assert caught.value.hint == "type the same command again"


def test_pieces_that_do_not_add_up_leave_no_file(tmp_path: Path) -> None:
    short = Streamed(TensorInfo(dtype="F32", shape=(3,)), lambda: [torch.zeros(2)])
    with pytest.raises(ValueError, match="'x' takes 12 bytes, and its pieces have 8"):
        stream_tensors(tmp_path / "file", {"x": short})
    assert list(tmp_path.iterdir()) == []
