"""How float32 numbers are multiplied, and what that does to the identity of a reconstruction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import BitWidth, ReconstructConfig
from edadm_cli.processes import ALONE
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct.hyperparameters import resolve
from edadm_cli.reconstruct.preparation import arithmetic
from edadm_cli.reconstruct.task import Task

SELECTION: Any = SimpleNamespace(manifest=SimpleNamespace(model=None))


def _task(device: str, matmul: str | None) -> Task:
    recipe, bits = load_recipe("rtn"), BitWidth.parse("w4a8")
    config = ReconstructConfig(bits=bits, recipe=recipe, matmul=matmul)
    learning = resolve(recipe.learn, None, bits)
    task = Task(config, RunFolder(Path()), SELECTION, None, 4, learning, ALONE)
    vars(task)["device"] = torch.device(device)  # this machine may have no such device
    return task


@pytest.mark.parametrize(("matmul", "in_identity"), [(None, None), ("tf32", None), ("float32", "float32")])
def test_a_gpu_multiplies_in_tf32_unless_float32_is_asked_for_and_then_the_identity_says_so(
    matmul: str | None, in_identity: str | None
) -> None:
    gpu = _task("cuda", matmul)
    assert gpu.build_spec().config.get("matmul") == in_identity
    with arithmetic(gpu):
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (matmul != "float32")


def test_what_a_cpu_reconstructs_keeps_its_identity() -> None:
    specs = [_task("cpu", matmul).build_spec() for matmul in (None, "float32")]
    assert specs[0].config == specs[1].config
    assert "matmul" not in specs[0].config
