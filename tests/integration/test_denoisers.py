"""A quick part of the table of denoisers; `make table` makes all of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import diffusers as d
import pytest

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import CollectConfig, SelectConfig
from edadm_cli.errors import UsageError
from edadm_cli.select import stage as select
from tests.denoisers.classes import VERDICTS, denoiser_classes
from tests.denoisers.further import anyflow
from tests.denoisers.page import DOCS
from tests.denoisers.rows import ROWS
from tests.denoisers.table import measure
from tests.denoisers.unets import kandinsky22

# one tensor per image and prompts of different length; guidance in two calls per step
QUICK = ("z_image", "qwen_image")


@pytest.mark.parametrize("name", QUICK)
def test_a_denoiser_goes_through_the_chain(name: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == name)
    result = measure(row, tmp_path, is_quick=True)
    assert result.refusal is None
    assert result.blocks >= 2
    quantized, layers = result.layers
    assert 0.8 * layers < quantized <= layers


def test_every_denoiser_class_of_diffusers_has_a_line() -> None:
    table = DOCS.read_text(encoding="utf-8")
    lines = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    missing = denoiser_classes() - lines
    assert not missing, f"write a verdict in tests/denoisers/classes.py, or a row, for {', '.join(sorted(missing))}"
    assert not VERDICTS.keys() - denoiser_classes()


def test_guidance_that_a_pipeline_ignores_ends_a_collection_with_its_own_reason(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == "flux2_klein")
    result = measure(replace(row, guidance=4.0), tmp_path, is_quick=True)
    assert "sampled without guidance, though its scale is 4" in (result.refusal or "")
    assert "is ignored" in (result.refusal or "")


def test_a_pipeline_with_a_guider_says_where_its_scale_is(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.build.__name__ == "hunyuan_video15")
    row.build().save_pretrained(tmp_path / "model")
    config = CollectConfig(model=str(tmp_path / "model"), guidance_scale=4.0, device="cpu")
    with pytest.raises(UsageError, match="guides as its component 'guider' says") as error:
        collect.run(config, RunFolder(tmp_path / "run"))
    assert "guider/guider_config.json" in error.value.hint
    assert (tmp_path / "model/guider/guider_config.json").is_file()


def test_the_documented_lines_make_a_folder_of_kandinsky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two pipelines of the hub are tiny ones on disk here; the card of the decoder names its prior, as there."""
    monkeypatch.chdir(tmp_path)
    whole = kandinsky22()
    prior = {name.removeprefix("prior_"): part for name, part in whole.components.items() if name.startswith("prior_")}
    d.KandinskyV22PriorPipeline(**prior).save_pretrained("prior")
    d.KandinskyV22Pipeline(unet=whole.unet, scheduler=whole.scheduler, movq=whole.movq).save_pretrained("decoder")
    Path("decoder/README.md").write_text("---\nprior:\n- prior\n---\n", encoding="utf-8")
    (lines,) = re.findall(r"```python\n([^`]*AutoPipelineForText2Image[^`]*)```", DOCS.read_text(encoding="utf-8"))
    exec(lines.replace("kandinsky-community/kandinsky-2-2-decoder", "decoder"))
    config = CollectConfig(
        model="kandinsky-2.2",
        num_trajectories=2,
        num_steps=2,
        height=32,
        width=32,
        prompts=Path("prompts"),
        device="cpu",
    )
    Path("prompts").write_text("a cat\n", encoding="utf-8")
    assert collect.run(config, RunFolder(tmp_path / "run")).model == "kandinsky-2.2"


def test_an_input_that_changes_from_step_to_step_goes_with_its_step(tmp_path: Path) -> None:
    """AnyFlow is also called with the timestep at which a step ends, which is that of the next step."""
    anyflow().save_pretrained(tmp_path / "model")
    run = RunFolder(tmp_path / "run")
    size = {"height": 16, "width": 16, "num_frames": 5}
    config = CollectConfig(
        model=str(tmp_path / "model"), num_trajectories=4, num_steps=3, batch_size=2, device="cpu", **size
    )
    collect.run(config, run)
    select.run(SelectConfig(device="cpu", strategy="uniform"), run)
    timesteps = run.open("collect").tensors("features.safetensors", ["timesteps"])["timesteps"].tolist()
    chosen = run.open("select").tensors("calibration.safetensors")
    ends = [*timesteps[1:], 0.0]
    steps = chosen["step_index"].tolist()
    assert len(set(steps)) == 3
    for step, of_frames in zip(steps, chosen["condition.r_timestep"].flatten(1), strict=True):
        assert of_frames.tolist() == pytest.approx([ends[step]] * len(of_frames))
