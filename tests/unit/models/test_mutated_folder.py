"""Seeded mutants of a model folder: each one is sampled from or refused in one sentence, and nothing else happens."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm_cli.errors import EXIT_INPUT, EXIT_MACHINE, EXIT_USAGE, EdadmError
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample

CPU = torch.device("cpu")
NUM_MUTANTS = 30
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    9,
    10**5,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a" * 9999,
]
VALUES += [[], [[]], [1], ["a", "b"], {}, {"a": 1}, "\ud800", "\0", "None", "../..", ["diffusers", "UNet2DModel"]]
VOCABULARIES = ("tokenizer.json", "vocab.json")


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(folder: Path, generator: random.Random) -> str:
    """Change one value of one configuration; returns which and how."""
    files = sorted(path for path in folder.rglob("*.json") if path.name not in VOCABULARIES)
    file = generator.choice(files)
    content = json.loads(file.read_text())
    place = generator.choice(list(places(content)))
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    value = generator.choice(VALUES)
    if isinstance(owner, dict) and generator.random() < 0.1:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    file.write_text(json.dumps(content))
    return f"{file.relative_to(folder)} {place} {value!r:.40}"


@pytest.mark.parametrize("seed", range(NUM_MUTANTS))
def test_a_mutant_is_sampled_from_or_refused(
    seed: int, tiny_sd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    mutant = mutate(folder, random.Random(seed))
    refusal = None
    try:
        model = load_model(str(folder), CPU, torch.float32)
        sample(model, seeds=[0], prompts=["one"], num_steps=2, guidance_scale=2.0)
    except EdadmError as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code in (EXIT_USAGE, EXIT_INPUT, EXIT_MACHINE), mutant
        assert "\n" not in refusal.message, mutant
    assert capfd.readouterr().err == "", mutant
