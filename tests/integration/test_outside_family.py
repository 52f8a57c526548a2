"""A family of denoisers that another installed package brings, used through the command line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.integration.fresh_interpreter import FreshInterpreter

MODULE = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from edadm_cli.models.families import DenoiserFamily


class Toy(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class ToyDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=8, sample_size=8, in_channels=3):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.first, self.second = Toy(width), Toy(width)
        self.chain = nn.ModuleList([Toy(width)])

    def forward(self, noisy, when, return_dict=True):
        x = self.second(self.first(self.enter(noisy)) + when.reshape(-1, 1, 1, 1) / 1000)
        return UNet2DOutput(sample=self.leave(self.chain[0](x)))


FAMILY = DenoiserFamily(
    name="toy", denoisers=("ToyDenoiser",), blocks={"Toy": "residual"}, block_lists=("chain",),
    sample_arguments=("noisy",), timestep_arguments=("when",),
)
"""
BUILD = """
import sys
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from toy_family import ToyDenoiser
torch.manual_seed(0)
DDPMPipeline(unet=ToyDenoiser(), scheduler=DDPMScheduler()).save_pretrained(sys.argv[1])
"""
COMMANDS = """
import sys
from edadm_cli.cli.app import main
for command in sys.argv[1].split(";"):
    code = main(command.split())
    assert code == 0, command
"""


def install(site: Path) -> None:
    """Lay the package out as pip would: a module, and metadata with its entry point."""
    (site / "toy_family.py").write_text(MODULE)
    metadata = site / "toy_family-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[edadm.families]\ntoy = toy_family:FAMILY\n")


def python(interpreter: FreshInterpreter, code: str, *arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a separate process, with the packages of a folder installed."""
    interpreter.write_program(site / "program", code)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [str(site / "program"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)


def test_a_family_of_another_package_is_calibrated_and_quantized(
    fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    site, model, run = tmp_path / "site", tmp_path / "model", tmp_path / "run"
    site.mkdir()
    install(site)
    assert python(fresh_interpreter, BUILD, str(model), site=site).returncode == 0
    recipe = tmp_path / "quick.toml"
    recipe.write_text('extends = "default"\n[learn]\niterations = 2\n')
    commands = [
        f"collect --model {model} --run {run} --num-trajectories 4 --num-steps 3 --device cpu --quiet",
        f"select --run {run} --device cpu --quiet",
        f"reconstruct --run {run} --bits w4a8 --recipe {recipe} --device cpu --quiet",
        f"export --run {run} --bits w4a8 --device cpu --quiet",
    ]
    done = python(fresh_interpreter, COMMANDS, ";".join(commands), site=site)
    assert done.returncode == 0, done.stderr
    units: list[dict[str, Any]] = json.loads((run / "reconstruct/w4a8/units.json").read_text())["units"]
    assert [unit["name"] for unit in units if unit["kind"] == "residual"] == ["first", "second", "chain.0"]
    assert (run / "export/w4a8/unet").is_dir()
