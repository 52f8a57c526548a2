"""Transforms of inputs through the command line: one of this package, and one that another installed package brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edadm_cli.artifacts import RunFolder
from tests.integration.fresh_interpreter import FreshInterpreter
from tests.integration.test_outside_family import COMMANDS, python

FreshRun = Callable[[Path], RunFolder]
MODULE = """
from edadm_cli.quant.transforms import Transform


class Reverse(Transform):
    name = "toy-reverse"
    tensors = ()

    def calibrate(self, weight, statistics, options):
        return {}

    def apply(self, x, tensors, channel_dim):
        return x.float().flip(channel_dim)

    def fold(self, weight, tensors):
        return weight.flip(1)
"""


def _install(site: Path) -> None:
    (site / "toy_transform.py").write_text(MODULE)
    metadata = site / "toy_transform-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-transform\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[edadm.transforms]\ntoy = toy_transform:Reverse\n")


@pytest.mark.parametrize("name", ["toy-reverse", "input-channel-scale"])
def test_a_recipe_with_a_transform_goes_through_the_command_line(
    name: str, tiny_ddpm: Path, fresh_run: FreshRun, fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    """Reconstructed, exported and loaded again; the exact integers of the reference agree, layer by layer."""
    _install(tmp_path)
    run = fresh_run(tiny_ddpm)
    recipe = tmp_path / "own.toml"
    text = 'extends = "default"\n[learn]\niterations = 2\nbatch_size = 4\n[ranges]\nnum_candidates = 4\n'
    recipe.write_text(f'{text}weight = "output-error"\n[[transforms]]\nname = "{name}"\npattern = "*resnets*"\n')
    common = f"--run {run.root} --device cpu"
    commands = f"reconstruct --bits w6a6 --recipe {recipe} {common} --quiet;export --bits w6a6 {common} --json"
    done = python(fresh_interpreter, COMMANDS, commands, site=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["parity"]["images_bit_equal"]
    assert printed["parity"]["integer_rel_l2"] <= printed["parity"]["integer_bound"]
    plan = run.open("reconstruct", "w6a6").json("plan.json")["layers"]
    assert {layer.get("transform") for key, layer in plan.items() if "resnets" in key} == {name}
    assert {layer.get("transform") for key, layer in plan.items() if "resnets" not in key} == {None}
    if name == "input-channel-scale":
        params = run.open("reconstruct", "w6a6").tensors("quant_params.safetensors")
        assert params["mid_block.resnets.0.conv1.input_channel_scale"].dtype == torch.float32


def test_a_transform_that_nobody_brought_is_a_usage_error(
    tiny_ddpm: Path, fresh_run: FreshRun, fresh_interpreter: FreshInterpreter, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('extends = "default"\n[[transforms]]\nname = "nothing"\n')
    command = f"reconstruct --bits w4a8 --recipe {recipe} --run {fresh_run(tiny_ddpm).root} --device cpu"
    code = "import sys\nfrom edadm_cli.cli.app import main\nsys.exit(main(sys.argv[1].split()))"
    done = python(fresh_interpreter, code, command, site=tmp_path)
    assert done.returncode == 2
    assert "There is no transform 'nothing'; known are hadamard-16, " in " ".join(done.stderr.split())
