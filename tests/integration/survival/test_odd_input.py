"""Odd bit widths, prompt files and models: one sentence and the right exit code, and no foreign code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.cli.app import main
from tests.integration.survival.helpers import (
    OPTIONS,
    Capture,
    failure,
    hashes,
    put_a_foreign_file,
    truncate,
)


@pytest.mark.parametrize("bits", ["w9a8", "w4", "banana"])
def test_bit_widths_that_are_none(run: Path, capsys: Capture, bits: str) -> None:
    before = hashes(run)
    assert f"got '{bits}'" in failure(capsys, ["reconstruct", "--bits", bits, "--run", str(run)], 2)
    assert hashes(run) == before


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "prompts.txt"), (b"", "prompts.txt"), (b"\n \n", "prompts.txt"), (b"caf\xe9 \xff\n", "UTF-8")],
    ids=["missing", "empty", "blank", "not UTF-8"],
)
def test_prompt_files_that_cannot_be_used(
    tiny_sd: Path, tmp_path: Path, capsys: Capture, content: bytes | None, text: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--prompts", str(path), "--run", str(tmp_path / "run")]
    assert text in failure(capsys, ["collect", "--model", str(tiny_sd), *OPTIONS, *arguments], 3)
    assert not (tmp_path / "run" / "collect").exists()


@pytest.mark.parametrize(
    "lines",
    [["<script>alert(1)</script>", "[bold]x[/bold]", "\x1b[31mred"], [f"prompt {i}" for i in range(10_000)]],
    ids=["markup", "10,000 lines"],
)
def test_prompt_files_that_are_odd_but_usable(
    tiny_sd: Path, tmp_path: Path, capsys: Capture, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    capsys.readouterr()
    arguments = ["--prompts", "prompts.txt", "--run", "run", "--json"]
    assert main(["collect", "--model", str(tiny_sd), *OPTIONS, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert json.loads(Path("run/collect/sampling.json").read_text())["prompts"][:3] == lines[:3]


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "loop", "a/b", "--dry-run"],
        ["collect", "--model", "MODEL", "--images", "loop"],
        ["collect", "--model", "MODEL", "--images", "~a-user-that-nobody-is/images"],
        ["collect", "--model", "~a-user-that-nobody-is/model"],
        ["select", "--config", "loop"],
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_paths_that_lead_nowhere(arguments: list[str], run: Path, tiny_ddpm: Path, capsys: Capture) -> None:
    Path("loop").symlink_to("loop")
    words = [str(tiny_ddpm) if word == "MODEL" else word for word in arguments]
    where = [] if words[0] == "push" else ["--run", str(run), "--device", "cpu"]
    code = 2 if "--config" in words else 3  # a configuration is part of the command
    message = failure(capsys, [*words, *where], code)
    assert "loop" in message or "home folder" in message


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_pickled_checkpoint_with_code_in_it_runs_nothing(tiny_ddpm: Path, tmp_path: Path, capsys: Capture) -> None:
    import torch

    trace = tmp_path / "the-code-ran"
    model = tmp_path / "model"
    shutil.copytree(tiny_ddpm, model)
    (weights,) = (model / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({"conv_in.weight": _Code(trace)}, model / "unet" / "diffusion_pytorch_model.bin")
    pickle.loads(pickle.dumps(_Code(tmp_path / "the-trap-works")))
    assert (tmp_path / "the-trap-works").exists()
    single = tmp_path / "model.ckpt"
    torch.save({"state_dict": _Code(trace)}, single)
    for path in (model, single):
        failure(capsys, ["collect", "--model", str(path), *OPTIONS, "--run", str(tmp_path / "run")], 3)
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["nan", "truncated", "foreign"])
def test_broken_weights_are_refused(tiny_ddpm: Path, tmp_path: Path, capsys: Capture, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_ddpm, model)
    (weights,) = (model / "unet").glob("*.safetensors")
    if damage == "nan":
        tensors = load_file(weights)
        tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
        save_file(tensors, weights)
    elif damage == "truncated":
        truncate(weights)
    else:
        put_a_foreign_file(weights)
    message = failure(capsys, ["collect", "--model", str(model), *OPTIONS, "--run", str(tmp_path / "run")], 3)
    assert ("conv_in.weight" if damage == "nan" else weights.name) in message
