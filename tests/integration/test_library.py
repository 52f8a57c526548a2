"""The program of the README, from collect to export, does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from edadm_cli.artifacts import RunFolder

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("forked_processes")
def test_the_program_of_the_readme_runs(
    few_blocks_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented program runs, with a tiny model and a quick recipe."""
    (tmp_path / "quick.toml").write_text('extends = "rtn"\n[ranges]\nnum_candidates = 4\n')
    (program,) = re.findall(r"^## In Python$.*?^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    assert len(program.split("\n")) <= 13
    small = f'{str(few_blocks_sd)!r}, num_trajectories=4, num_steps=2, batch_size=4, device="cpu", recipe="quick.toml"'
    assert program.count('"digits-sd"') == 1
    program = program.replace('"digits-sd"', small)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(README), "exec"), {})
    shown = capsys.readouterr().out
    assert "images_bit_equal=True" in shown
    assert "openvino" in shown
    assert (tmp_path / "seven.png").is_file()
    folder = RunFolder(Path("runs/mine")).open("export", "w4a8").path
    assert DiffusionPipeline.from_pretrained(folder).unet.hf_quantizer.quantization_config.bits == "w4a8"
