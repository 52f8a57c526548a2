"""Prompt files: what people hand over, and what must be refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from edadm_cli.errors import EXIT_INPUT, InputError, MachineError, UsageError
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.prompts import (
    CAPTIONS,
    MAX_PROMPT_CHARACTERS,
    prompts_name,
    read_prompts,
    resolve_prompts,
)


@pytest.fixture(scope="module")
def stable_diffusion(tiny_sd: Path) -> LoadedModel:
    return load_model(str(tiny_sd), torch.device("cpu"), torch.float32)


def test_lines_are_prompts_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  <script>alert(1)</script>  \n\t\nein Bär 🐻\u2028two lines? no".encode())
    assert read_prompts(path) == ["a cat", "<script>alert(1)</script>", "ein Bär 🐻\u2028two lines? no"]


def test_ten_thousand_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(10_000)))
    assert len(read_prompts(path)) == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n \n\t\n", "holds no prompt"),
        (b"fine\n\xff\xfe broken", "not UTF-8: byte 5"),
        (b"fine\n" + b"x" * (MAX_PROMPT_CHARACTERS + 1), "Line 2"),
    ],
)
def test_files_that_are_no_prompts_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert caught.value.exit_code == EXIT_INPUT


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path, Path("/"), Path("/dev/zero")):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(path)


def test_a_file_that_may_not_be_read_is_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path, *arguments: object) -> None:  # permissions do not hold root
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = tmp_path / "prompts.txt"
    path.write_text("a")
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(MachineError, match=r"prompts\.txt cannot be read: permission is denied"):
        read_prompts(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with path.open("wb") as file:
        file.truncate(10**10)  # sparse: takes no space
    with pytest.raises(InputError, match="10000000000 bytes"):
        read_prompts(path)


def test_images_take_the_first_prompts_or_go_round_again(stable_diffusion: LoadedModel) -> None:
    prompts = ["a", "b", "c"]
    assert resolve_prompts(stable_diffusion, prompts, 2, seed=0) == ["a", "b"]
    assert resolve_prompts(stable_diffusion, prompts, 5, seed=0) == ["a", "b", "c", "a", "b"]


def test_without_a_file_the_built_in_captions_serve(stable_diffusion: LoadedModel, tmp_path: Path) -> None:
    captions = read_prompts(CAPTIONS)
    assert len(set(captions)) == len(captions) == 256
    assert all(3 <= len(caption.split()) <= 20 for caption in captions)
    assert resolve_prompts(stable_diffusion, None, 300, seed=0) == [*captions, *captions[:44]]
    assert prompts_name(stable_diffusion.entry, None) == "edadm-captions-256"
    assert prompts_name(stable_diffusion.entry, tmp_path) == "file"


def test_coco_captions_give_each_image_its_first(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    rows = [(7, "A cat.\n"), (7, "The same cat."), (9, " Two  dogs "), (3, "A boat.")]
    annotations = [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(rows)]
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert read_prompts(path) == ["A cat.", "Two dogs", "A boat."]
    path.write_text(json.dumps(["one", "", "two"]))
    assert read_prompts(path) == ["one", "two"]


def test_tables_have_a_column_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('id,caption,alt\n1,"a cat, asleep",x\n2,"two\nlines",y\n3,,z\n')
    assert read_prompts(path) == ["a cat, asleep", "two lines"]
    assert read_prompts(Path(f"{path}:alt")) == ["x", "y", "z"]
    tabs = tmp_path / "prompts.tsv"
    tabs.write_text("prompt\timage\na cat, asleep\ta.png\n")
    assert read_prompts(tabs) == ["a cat, asleep"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not readable JSON"),
        ("a.json", "{}", "neither COCO"),
        ("a.json", "[" * 100_000, "not readable JSON"),
        ("a.json", '[{"image_id": 1}]', "Entry 1 .* no caption"),
        ("a.json", "[]", "holds no prompt"),
        ("a.csv", "a,b\n1,2\n", "it has a, b"),
        ("a.csv", "", "none at all"),
        ("a.csv", "caption\n" + "x" * (MAX_PROMPT_CHARACTERS + 1), "Line 2"),
        ("a.csv", 'caption\n"open', "not a readable table"),
        ("a.csv:nothing", "caption\nx\n", "no column 'nothing'"),
    ],
)
def test_files_that_are_not_what_their_names_promise_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_model_that_takes_no_prompts_refuses_them(tiny_ddpm: Path) -> None:
    model = load_model(str(tiny_ddpm), torch.device("cpu"), torch.float32)
    assert resolve_prompts(model, None, 2, seed=0) is None
    with pytest.raises(UsageError, match="takes no prompts"):
        resolve_prompts(model, ["a"], 2, seed=0)


def test_the_digits_entry_brings_its_prompts(stable_diffusion: LoadedModel) -> None:
    entry = stable_diffusion.entry.model_copy(update={"prompts": "digits"})
    model = LoadedModel(stable_diffusion.ref, entry, stable_diffusion.pipeline, "unet", stable_diffusion.folder)
    first, again = (resolve_prompts(model, None, 20, seed=3) for _ in range(2))
    assert first is not None
    assert len(first) == 20
    assert first == again
    assert prompts_name(model.entry, None) == "digits"
    assert first != resolve_prompts(model, None, 20, seed=4)


@pytest.mark.parametrize(
    "content",
    [
        '[["one", "two"]]',
        "[[[]]]",
        '{"annotations": [{"image_id": [1], "caption": "a"}]}',
        '{"annotations": [{"image_id": {}, "caption": "a"}]}',
        '{"annotations": [["a"]]}',
        '["half \\ud800"]',
        "[" + "9" * 5000 + "]",
        "[" * 100_000,
    ],
)
def test_json_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert len(caught.value.message) < 500


def test_a_prompt_file_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    for path in (tmp_path / "prompts.txt", tmp_path, tmp_path / ("a" * 5000), tmp_path / f"{'a' * 300}.csv:b"):
        with pytest.raises(InputError):
            read_prompts(path)
