"""The data script and the training code of the emoji models, without the archive and without a GPU."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.emoji.captions import MAX_TOKENS, STYLES, captions_of
from edadm_cli.models.emoji.data import WEIGHTS, real_pictures
from edadm_cli.models.emoji.encoder import load_picture_encoder
from edadm_cli.models.emoji.train import __main__ as program
from edadm_cli.models.emoji.train import loop
from edadm_cli.models.emoji.train.corpus import Pictures
from edadm_cli.models.emoji.train.loop import Schedule, fit
from edadm_cli.models.emoji.train.measure import Judge
from edadm_cli.models.emoji.train.names import WordSplitter, words_of
from edadm_cli.models.emoji.train.packed import load_packed, pack, small_pictures
from edadm_cli.models.emoji.train.pipelines import load_tokenizer
from edadm_cli.models.emoji.train.prepare import held_out_names, prepare, svg_of
from edadm_cli.models.emoji.train.settings import TrainSettings


def test_names_of_all_sets_become_the_same_words() -> None:
    icons = {"judge", "judge-medium-dark", "canada"}
    assert words_of("judge-medium-dark", "fluent-emoji", icons) == "judge medium dark skin tone"
    assert words_of("judge-medium-dark-skin-tone", "noto", icons) == "judge medium dark skin tone"
    assert words_of("flag-for-flag-bahamas", "twemoji", icons) == "flag bahamas"
    assert words_of("woman-judge-2", "streamline-emojis", icons) == "woman judge"
    split = WordSplitter(["red heart", "small red square", "arrow"])
    assert split("smallredheart2") == "small red heart 2"


def test_held_out_names_ask_for_nothing_that_training_does_not_show() -> None:
    people, tones = ("man", "woman", "child"), ("light", "medium", "dark", "pale")
    names = [f"{who} {job} {tone}" for who in people for job in ("cook", "judge", "pilot") for tone in tones]
    names += ["sheep", "anchor"]
    held_out = held_out_names(names)
    assert held_out == held_out_names(names)
    assert len(held_out) == round(0.05 * len(names))
    left = {word for name in set(names) - held_out for word in name.split()}
    assert all(word in left for name in held_out for word in name.split())


def test_an_icon_is_centred_in_a_square() -> None:
    svg = svg_of({"body": "<g/>", "width": 10}, {"width": 36, "height": 36})
    assert 'viewBox="-13 0 36 36"' in svg


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive like the npm package's, with three icons per set."""
    folder = tmp_path / "package"
    (folder / "json").mkdir(parents=True)
    licence = {"license": {"spdx": "MIT", "url": "https://example.org"}, "author": {"name": "Someone"}}
    for name in STYLES:
        icons = {icon: {"body": f'<circle r="{size}"/>'} for size, icon in enumerate(("cat", "dog", "red-heart"), 4)}
        icons["old"] = {"body": "<g/>", "hidden": True}  # type: ignore[dict-item]
        (folder / "json" / f"{name}.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
    (folder / "collections.json").write_text(json.dumps(dict.fromkeys(STYLES, licence)))
    path = tmp_path / "iconify.tgz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, "package")
    return path


def test_preparing_writes_a_card_and_is_up_to_date_afterwards(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepared"
    card = prepare(archive, out)
    assert card["pictures"] == 3 * len(STYLES)
    assert all(entry["licence"] == "MIT" and entry["pictures"] == 3 for entry in card["sets"].values())
    with numpy.load(out / "tokens.npz") as arrays:
        assert arrays["captions"].shape == (card["pictures"], len(captions_of("cat", "noto")), MAX_TOKENS)
    before = (out / "pictures.json.xz").stat().st_mtime_ns
    assert prepare(archive, out) == card
    assert (out / "pictures.json.xz").stat().st_mtime_ns == before


def test_a_missing_archive_names_the_command_that_gets_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "none.tgz", tmp_path / "prepared")
    assert caught.value.hint == "npm pack @iconify/json@2.2.535"


class _Line:
    """Fits a line; the smallest task of the loop."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(2, 1)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        inputs = torch.randn(count, 2, generator=generator)
        return inputs, inputs.sum(1, keepdim=True)

    def loss(self, *inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.module(inputs[0]), inputs[1])


def test_a_resumed_training_ends_like_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))  # a second per step
    schedule = Schedule(batch_size=8, learning_rate=1e-2, warmup_steps=3)

    def settings(folder: str, stop_after: float | None = None) -> TrainSettings:
        device = torch.device("cpu")
        return TrainSettings(tmp_path, tmp_path / folder, device, steps=25, stop_after=stop_after)

    whole = _Line()
    assert fit(whole, schedule, settings("whole"), "line").done
    interrupted = fit(_Line(), schedule, settings("parts", stop_after=12.0), "line")
    assert 0 < interrupted.steps < 25
    resumed = _Line()
    assert fit(resumed, schedule, settings("parts"), "line").steps == 25
    assert torch.equal(whole.module.weight, resumed.module.weight)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A file of twenty real pictures, two of them with held-out names."""
    path = tmp_path / "pictures.npz"
    pack(Pictures(real_pictures()[:20], train=torch.arange(2, 20), held_out=torch.arange(2)), b"{}", path)
    return path


def test_packed_pictures_are_read_as_they_were_written(packed: Path, tmp_path: Path) -> None:
    pictures = load_packed(TrainSettings(packed, tmp_path, torch.device("cpu")))
    assert torch.equal(pictures.pixels, small_pictures(real_pictures()[:20]))
    assert pictures.held_out.tolist() == [0, 1]
    assert pictures.train.tolist() == list(range(2, 20))
    some = load_packed(TrainSettings(packed, tmp_path, torch.device("cpu"), limit=5))
    assert torch.equal(some.pixels, pictures.pixels[::4])
    assert some.held_out.tolist() == [0]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x05\x06" + bytes(18)])
def test_another_file_is_no_file_of_packed_pictures(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no file of packed pictures"):
        load_packed(TrainSettings(path, tmp_path, torch.device("cpu")))


def train(*words: str) -> None:
    options = program.build_parser().parse_args([*words, "--device", "cpu", "--small", "--batch-size", "4"])
    settings = program.settings_of(options)
    program.run(options, program.load(options, settings), settings)


def test_the_pixel_stage_leaves_a_pipeline_that_can_be_collected_from(packed: Path, tmp_path: Path) -> None:
    from edadm_cli.artifacts import RunFolder
    from edadm_cli.collect.stage import run as collect
    from edadm_cli.config import CollectConfig

    out = tmp_path / "out"
    train("ddpm-emoji", "--data", str(packed), "--out", str(out), "--steps", "2", "--pictures", "0")
    folder, run = out / "weights" / "ddpm-emoji", RunFolder(tmp_path / "run")
    assert json.loads((folder / "training.json").read_text())["steps"] == 2
    assert (out / "samples" / "ddpm-emoji.png").is_file()
    collect(CollectConfig(model=str(folder), num_trajectories=2, num_steps=2, device="cpu"), run)
    collected = CollectedRun.open(run)
    assert (collected.entry.num_steps, collected.entry.image_size, collected.guidance_scale) == (50, 32, None)
    assert collected.sampling.scheduler.class_name == "DDIMScheduler"
    assert collected.sampling.scheduler.config["clip_sample"] is False


def test_the_shipped_weights_are_measured_and_never_trained(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", "--weights", str(WEIGHTS)]
    settings = program.settings_of(program.build_parser().parse_args(["measure", *words]))
    assert settings.weights == WEIGHTS
    pictures = real_pictures()[:2]
    features, _ = Judge(settings, load_tokenizer(settings)).pictures(pictures)
    torch.testing.assert_close(features, load_picture_encoder()(pictures.float() / 255).features)
    with pytest.raises(UsageError, match="--weights goes with"):
        program.settings_of(program.build_parser().parse_args(["encoder", *words]))


def test_only_the_pixel_stage_takes_a_file(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes the folder"):
        train("emoji-sd", "--data", str(packed), "--out", str(tmp_path), "--steps", "1")
