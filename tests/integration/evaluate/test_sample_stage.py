"""`edadm sample` on tiny pipelines."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.config import BitWidth, SampleConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.estimates import sample as sample_estimates
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.sample import building, stage
from edadm_cli.sample.pictures import FACTS_KEY

Exporter = Callable[[RunFolder, float], Artifact]
BITS = BitWidth(weight=4, activation=8)


def _config(**fields: Any) -> SampleConfig:
    return SampleConfig(**{"bits": BITS, "num_images": 3, "batch_size": 2, "device": "cpu", **fields})


def test_files_are_named_by_seed_and_hold_the_image_of_that_seed(pixel_run: RunFolder) -> None:
    record = stage.run(_config(seed=40), pixel_run)
    assert record.status == "done"
    folder = pixel_run.root / "samples" / "w4a8"
    assert record.images == tuple(str(folder / f"0000{seed}.png") for seed in (40, 41, 42))
    model = load_model(str(pixel_run.path("export", "w4a8")), torch.device("cpu"), torch.float32)
    alone = sample(model, seeds=[42], prompts=None, num_steps=2, guidance_scale=None).images[0, 0]
    np.testing.assert_array_equal(np.asarray(Image.open(record.images[2])), alone.numpy())


def test_prompts_enter_the_names_as_far_as_names_allow(text_run: RunFolder) -> None:
    record = stage.run(_config(prompt=("../../etc/Passwd é", "a seven", "<>/\\|")), text_run)
    names = [Path(path).name for path in record.images]
    assert re.sub("[0-9a-f]{8}[.]", "#.", " ".join(names)) == "000000-etc-passwd-#.png 000001-a-seven.png 000002-#.png"
    assert all(Path(path).parent == text_run.root / "samples" / "w4a8" for path in record.images)


def test_without_a_prompt_the_models_own_are_used(text_run: RunFolder) -> None:
    from edadm_cli.models.digits.data import prompts

    record = stage.run(_config(), text_run)
    expected = [prompt.replace(" ", "-") for prompt in prompts(3, 0)]
    assert [Path(path).stem.partition("-")[2] for path in record.images] == expected


def test_what_is_there_is_not_sampled_again(pixel_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.run(_config(), pixel_run)
    sampled: list[int] = []

    def counted(model: LoadedModel, **arguments: Any) -> Samples:
        sampled.extend(arguments["seeds"])
        return sample(model, **arguments)

    monkeypatch.setattr(building, "sample", counted)
    again = stage.run(_config(), pixel_run)
    assert (again.status, sampled) == ("up_to_date", [])
    assert stage.run(_config(num_images=5), pixel_run).status == "done"
    assert sampled == [3, 4]


def test_a_plan_finds_what_a_run_would_find(pixel_run: RunFolder) -> None:
    assert stage.finished(_config(), pixel_run) is None
    record = stage.run(_config(), pixel_run)
    actual = stage.finished(_config(num_images=2), pixel_run)
    assert actual is not None
    assert (str(actual.path), actual.identity) == (record.artifact, record.identity)
    assert stage.finished(_config(num_images=4), pixel_run) is None
    with pytest.raises(InputError, match="another image"):
        stage.finished(_config(num_steps=3), pixel_run)


def test_another_image_of_the_same_name_is_replaced_with_force_only(
    pixel_run: RunFolder, export_noisy: Exporter
) -> None:
    (path, *_) = stage.run(_config(), pixel_run).images
    before = Path(path).read_bytes()
    with pytest.raises(InputError, match=r"is another image: its num steps is 2 and not 3[.]"):
        stage.run(_config(num_steps=3), pixel_run)
    export_noisy(pixel_run, 0.3)
    with pytest.raises(InputError, match=r"is another image: its export is '[0-9a-f]*' and not '[0-9a-f]*'[.]"):
        stage.run(_config(), pixel_run)
    assert Path(path).read_bytes() == before
    assert stage.run(_config(), pixel_run, force=True).status == "done"
    assert Path(path).read_bytes() != before


@pytest.mark.parametrize("crafted", ["too-large", "deep"])
def test_a_crafted_picture_in_its_place_is_named(pixel_run: RunFolder, crafted: str) -> None:
    path = pixel_run.root / "samples" / "w4a8" / "000000.png"
    path.parent.mkdir(parents=True)
    info = PngInfo()
    info.add_itxt(FACTS_KEY, "[" * 100_000)
    Image.new("L", (1, 1)).save(path, pnginfo=info)
    if crafted == "too-large":  # Pillow refuses a header with so many pixels, with an error of its own
        content = bytearray(path.read_bytes())
        content[16:24] = (60_000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content)
    with pytest.raises(InputError, match="a file that edadm did not write"):
        stage.run(_config(), pixel_run)


def test_prompts_and_guidance_are_refused_for_a_model_without(pixel_run: RunFolder) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        stage.run(_config(prompt=("a seven",)), pixel_run)
    with pytest.raises(UsageError, match="no guidance"):
        stage.run(_config(guidance_scale=3.0), pixel_run)


def test_integer_arithmetic_needs_quantized_layers(pixel_run: RunFolder) -> None:
    with pytest.raises(InputError, match="no quantized layer"):
        stage.run(_config(arithmetic="integer"), pixel_run)


def test_a_missing_export_names_the_command_that_makes_it(pixel_run: RunFolder) -> None:
    with pytest.raises(InputError) as caught:
        stage.run(_config(bits=BitWidth(weight=8, activation=8)), pixel_run)
    assert (caught.value.hint or "").startswith("edadm export --bits w8a8")


def test_estimate_writes_nothing(pixel_run: RunFolder) -> None:
    before = sorted(pixel_run.root.rglob("*"))
    assert sample_estimates.estimate(_config(), pixel_run).seconds > 0
    assert sorted(pixel_run.root.rglob("*")) == before
