"""Prompt files: what people hand over, and what must be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edadm_cli.errors import EXIT_INPUT, InputError, UsageError
from edadm_cli.models.loading import LoadedModel, load_model
from edadm_cli.models.prompts import MAX_PROMPT_CHARACTERS, read_prompts, resolve_prompts


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
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with path.open("wb") as file:
        file.truncate(10**10)  # sparse: takes no space
    with pytest.raises(InputError, match="10000000000 bytes"):
        read_prompts(path)


def test_images_take_the_first_prompts_or_go_round_again(stable_diffusion: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\n")
    assert resolve_prompts(stable_diffusion, path, 2, seed=0) == ["a", "b"]
    assert resolve_prompts(stable_diffusion, path, 5, seed=0) == ["a", "b", "c", "a", "b"]


def test_a_model_without_prompts_of_its_own_asks_for_a_file(stable_diffusion: LoadedModel) -> None:
    with pytest.raises(InputError, match="none of its own") as caught:
        resolve_prompts(stable_diffusion, None, 2, seed=0)
    assert "--prompts" in (caught.value.hint or "")


def test_a_model_that_takes_no_prompts_refuses_them(tiny_ddpm: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_ddpm), torch.device("cpu"), torch.float32)
    assert resolve_prompts(model, None, 2, seed=0) is None
    with pytest.raises(UsageError, match="takes no prompts"):
        resolve_prompts(model, tmp_path / "prompts.txt", 2, seed=0)


def test_the_digits_entry_brings_its_prompts(stable_diffusion: LoadedModel) -> None:
    entry = stable_diffusion.entry.model_copy(update={"prompts": "digits"})
    model = LoadedModel(stable_diffusion.ref, entry, stable_diffusion.pipeline, "unet", stable_diffusion.folder)
    first, again = (resolve_prompts(model, None, 20, seed=3) for _ in range(2))
    assert first is not None
    assert len(first) == 20
    assert first == again
    assert first != resolve_prompts(model, None, 20, seed=4)
