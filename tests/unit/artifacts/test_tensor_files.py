"""Safetensors files: what is written is read, equal tensors are equal bytes, and damage is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from edadm_cli.artifacts import load_tensors, read_tensor_header, save_tensors
from edadm_cli.errors import InputError, MachineError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(-8, 8, (3, 5), generator=generator, dtype=torch.int8),
        "scale": torch.rand(7, generator=generator),
        "half": torch.rand(2, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "view": torch.rand(4, 6, generator=generator).t()[1:4],
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = _tensors()
    save_tensors(tmp_path / "a.safetensors", tensors)
    read = load_tensors(tmp_path / "a.safetensors")
    assert list(read) == sorted(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    tensors = _tensors()
    save_tensors(tmp_path / "a.safetensors", tensors)
    save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert b"__metadata__" not in content


def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "a.safetensors", _tensors())
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_tensors_that_share_memory_are_both_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "a.safetensors", {"whole": whole, "same": whole, "part": whole[2:4]})
    read = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(read["same"], whole)
    assert torch.equal(read["part"], whole[2:4])


def test_only_the_given_names_are_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", _tensors())
    assert list(load_tensors(tmp_path / "a.safetensors", ["scale"])) == ["scale"]
    with pytest.raises(InputError, match="no tensor 'missing'"):
        load_tensors(tmp_path / "a.safetensors", ["scale", "missing"])


def test_the_header_is_that_of_the_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", _tensors())
    header = read_tensor_header(tmp_path / "a.safetensors")
    assert header["codes"].dtype == "I8"
    assert header["codes"].shape == (3, 5)
    assert header["half"].dtype == "BF16"
    assert header["scalar"].shape == ()


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.safetensors"):
            load_tensors(path)
    path.write_bytes(content + b"x")
    with pytest.raises(InputError, match="foreign bytes"):
        load_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not tensors at all, just a line of text",
        b"\x80\x04\x95pickle" * 10,
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (len('{"a": 1}')).to_bytes(8, "little") + b'{"a": 1}',
        (len(b"[" * 50)).to_bytes(8, "little") + b"[" * 50,
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_tensors(path)


def test_a_header_that_lies_about_shapes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_tensors(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["Error while serializing: I/O error: No space left on device (os error 28)"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(2)})
    before = path.read_bytes()

    def fail(tensors: dict[str, torch.Tensor], filename: Path) -> None:
        Path(filename).write_bytes(b"half")
        raise safetensors.SafetensorError(text)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(MachineError, match="disk is full"):
        save_tensors(path, {"a": torch.ones(2)})
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_header_that_was_checked_is_checked_again_only_if_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"scale": torch.ones(3)})
    first = read_tensor_header(path)
    first.clear()
    assert read_tensor_header(path)["scale"].shape == (3,), "a caller cannot change what is remembered"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match="truncated"):
        read_tensor_header(path)
    path.write_bytes(content.replace(b"F32", b"F99"))
    with pytest.raises(InputError, match="unknown type"):
        read_tensor_header(path)
