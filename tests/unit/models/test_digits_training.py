"""The digits models' tokenizer, training loop and measurements."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.digits import data
from edadm_cli.models.digits.train import loop
from edadm_cli.models.digits.train.corpus import load_corpus
from edadm_cli.models.digits.train.measure import frechet_distance
from edadm_cli.models.digits.train.settings import TrainSettings, seed_of
from edadm_cli.models.digits.train.text_to_image import caption_tokens
from edadm_cli.models.digits.train.tokenizer import MAX_LENGTH, build_tokenizer, byte_symbols, learn_merges

_SCHEDULE = loop.Schedule(epochs=3, batch_size=16, learning_rate=0.05, warmup_steps=2)
_NUM_SAMPLES = 37  # no multiple of the batch: batches run on across the ends of epochs


class _LineTask:
    """Fit a line to noisy points."""

    def __init__(self, settings: TrainSettings) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.constant_(self.module.weight, 0.5)
        nn.init.zeros_(self.module.bias)
        self._inputs = torch.linspace(-1, 1, _NUM_SAMPLES).unsqueeze(1)
        self.seen: list[int] = []

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        self.seen += index.tolist()
        inputs = self._inputs[index]
        return inputs, 2 * inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

    def loss(self, *inputs: Tensor) -> Tensor:
        return (self.module(inputs[0]) - inputs[1]).square().mean()


def _settings(out: Path, seed: int = 0) -> TrainSettings:
    return TrainSettings(out=out, device=torch.device("cpu"), seed=seed, checkpoint_seconds=0.0)


def _fit(task: _LineTask, settings: TrainSettings) -> loop.FitResult:
    return loop.fit(task, _SCHEDULE, _NUM_SAMPLES, settings, "line")


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    undisturbed = _LineTask(_settings(tmp_path))
    result = _fit(undisturbed, _settings(tmp_path / "a"))

    class _Killed(_LineTask):
        def loss(self, *inputs: Tensor) -> Tensor:
            if len(self.seen) > 4 * _SCHEDULE.batch_size:
                raise KeyboardInterrupt
            return super().loss(*inputs)

    settings = _settings(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        _fit(_Killed(settings), settings)
    resumed = _LineTask(settings)
    again = _fit(resumed, settings)
    assert resumed.seen == undisturbed.seen[4 * _SCHEDULE.batch_size :]
    assert again.final_loss == result.final_loss
    assert torch.equal(resumed.module.weight, undisturbed.module.weight)
    assert torch.equal(resumed.module.bias, undisturbed.module.bias)


def test_every_epoch_sees_every_sample_once(tmp_path: Path) -> None:
    task = _LineTask(_settings(tmp_path))
    result = _fit(task, _settings(tmp_path))
    assert result.steps == round(3 * _NUM_SAMPLES / _SCHEDULE.batch_size) == len(task.seen) // 16
    first, second = task.seen[:_NUM_SAMPLES], task.seen[_NUM_SAMPLES : 2 * _NUM_SAMPLES]
    assert sorted(first) == sorted(second) == list(range(_NUM_SAMPLES))
    assert first != second


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    _fit(_LineTask(_settings(tmp_path)), _settings(tmp_path))
    with pytest.raises(InputError, match="seed"):
        _fit(_LineTask(_settings(tmp_path)), _settings(tmp_path, seed=1))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    schedule = dataclasses.replace(_SCHEDULE, warmup_steps=10)
    rates = [schedule.rate_at(step, 200) for step in range(200)]
    assert max(rates) == rates[9] == schedule.learning_rate
    assert all(low < high for low, high in itertools.pairwise(rates[:10]))
    assert all(high > low for high, low in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < schedule.learning_rate / 100


def test_seeds_differ_by_name_and_number() -> None:
    names = [("line", "step", 1), ("line", "step", 2), ("line", "epoch", 1), ("dot", "step", 1)]
    assert len({seed_of(seed, *name) for seed in (0, 1) for name in names}) == 8
    assert all(0 <= seed_of(0, *name) < 2**63 for name in names)


def test_frechet_distance_of_known_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mean, cov = torch.randn(6, generator=generator, dtype=torch.float64), factor @ factor.T
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(24)
    scaled = frechet_distance(mean, cov, mean, 9 * cov)  # the roots commute: trace of (3 - 1)^2 cov
    assert scaled == pytest.approx(4 * cov.trace().item())


def test_frechet_distance_survives_a_singular_covariance() -> None:
    zero, one = (
        torch.zeros(3, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, 0, 0], dtype=torch.float64)),
    )
    assert frechet_distance(zero, one, zero, torch.zeros_like(one)) == pytest.approx(1)


def test_byte_symbols_are_256_different_ones() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == len(symbols) == 256
    assert symbols[0] == "!"
    assert not any(symbol.isspace() for symbol in symbols)


def test_merges_share_parts() -> None:
    merges = learn_merges(["digit", "dig", "digits"])
    assert len(set(merges)) == len(merges)
    assert merges[:2] == [("d", "i"), ("di", "g")]


def test_every_word_of_the_captions_is_one_token() -> None:
    tokenizer = build_tokenizer()
    words = {word for digit in range(10) for text in data.captions_of(digit) for word in re.findall(r"\w+", text)}
    assert {word for word in words if len(tokenizer.tokenize(word)) != 1} == set()
    assert len(tokenizer.tokenize("cats")) == 4


def test_tokenizer_pads_and_survives_saving(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    assert read.model_max_length == MAX_LENGTH
    for prompt in ("A handwritten Seven", "the digit 7", "", "17 cats!", "a " * 40):
        tokens = read(prompt, padding="max_length", truncation=True).input_ids
        assert tokens == tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(tokens) == MAX_LENGTH
        assert tokens[0] == read.bos_token_id
        assert tokens[-1] == read.eos_token_id == read.pad_token_id
    seven = read("A handwritten Seven").input_ids
    assert len(seven) == 5
    assert read.decode(seven, skip_special_tokens=True) == "a handwritten seven"


def test_caption_tokens_differ_between_digits() -> None:
    rows = caption_tokens(build_tokenizer())
    assert rows.shape == (11, 24, MAX_LENGTH)
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 11
    assert len(rows[10].unique(dim=0)) == 1


@pytest.mark.skipif(not (data.WEIGHTS / "digits-sd").is_dir(), reason="the weights are not in this checkout")
def test_shipped_tokenizer_is_the_one_that_is_built() -> None:
    from transformers import CLIPTokenizer

    read = CLIPTokenizer.from_pretrained(data.model_folder("digits-sd") / "tokenizer")
    assert torch.equal(caption_tokens(read), caption_tokens(build_tokenizer()))


def test_other_files_than_mnist_are_refused(tmp_path: Path) -> None:
    import numpy

    with pytest.raises(InputError, match="no file"):
        load_corpus(tmp_path / "mnist.npz")
    numpy.savez(tmp_path / "mnist.npz", x_train=numpy.zeros((3, 28, 28), numpy.uint8))
    with pytest.raises(InputError, match="x_train"):
        load_corpus(tmp_path / "mnist.npz")
