"""Two processes at a stage, as torchrun starts them: the same results, one voice, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import BitWidth, CollectConfig, EvaluateConfig, ExportConfig, ReconstructConfig
from edadm_cli.evaluate import stage as evaluate
from edadm_cli.export import stage as export
from edadm_cli.processes import Processes
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct
from edadm_cli.reconstruct import trainer
from edadm_cli.reconstruct.optimization import Optimization
from edadm_cli.reconstruct.trainable_layers import Share
from edadm_cli.reconstruct.trainer import UnitLearner
from tests.integration.fresh_interpreter import FreshInterpreter

ROOT = Path(__file__).parents[2]
LIMIT_S = 280  # ends a test that hangs; nothing is measured by it
FreshRun = Callable[[Path], RunFolder]

RECIPE = """
extends = "paper"
[learn]
iterations = 6
batch_size = 5
rounding_regularizer = 0.0
[ranges]
num_candidates = 8
"""


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture
def program(fresh_interpreter: FreshInterpreter, tmp_path: Path) -> Path:
    """`edadm` without the price of its imports, for runs in which nobody dies: a signal ends the program, no more."""
    path = tmp_path / "edadm"
    fresh_interpreter.write_program(path, "import sys\nfrom edadm_cli.cli.app import main\nsys.exit(main())\n")
    return path


def torchrun(program: Path, *words: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 --no-python PROGRAM WORDS`."""
    return start(*TORCHRUN, "--no-python", "--", str(program), *words)


def accelerate_launch(program: Path, *words: str) -> subprocess.Popen[str]:
    """`accelerate launch --multi_gpu --num_processes 2 --no_python PROGRAM WORDS`."""
    return start(*ACCELERATE, "--no_python", str(program), *words)


def start(*words: str) -> subprocess.Popen[str]:
    """`python -m WORDS` on one thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def payload(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.payload}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Sums depend on how many threads share them, so the process of the test has one, like those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_trajectories_are_the_same_bytes_and_one_process_speaks(tiny_sd: Path, program: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    fields = {"num_trajectories": 5, "num_steps": 2, "batch_size": 2, "feature_batch": 3}
    alone = RunFolder(tmp_path / "alone")
    collect.run(CollectConfig(model=str(tiny_sd), prompts=prompts, device="cpu", **fields), alone)
    flags = [word for key, value in fields.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    place = ["--run", str(tmp_path / "two"), "--device", "cpu", "--json"]
    done = torchrun(program, "collect", "--model", str(tiny_sd), "--prompts", str(prompts), *flags, *place)
    out, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, err
    assert json.loads(out)["status"] == "done", "one line, of the main process"
    actual = RunFolder(tmp_path / "two").open("collect")
    assert payload(actual) == payload(alone.open("collect"))
    assert actual.identity == alone.open("collect").identity
    assert actual.manifest.environment["processes"] == 2
    of_torch = re.compile(r"\[?[IW]\d{4} ")  # its log, as of a host whose name cannot be resolved
    assert [line for line in err.splitlines() if not of_torch.match(line)] == []


# The second process reads the last unit late: the first one must not have cleaned up by then.
LATE_READER = """
import os, sys, time
from edadm_cli.reconstruct import checkpoint
load = checkpoint.load_tensors
def late(path):
    if os.environ["RANK"] == "1" and "conv_out" in str(path):
        time.sleep(2)
    return load(path)
checkpoint.load_tensors = late
from edadm_cli.cli.app import main
sys.exit(main())
"""


def test_two_processes_learn_what_one_learns_from_the_two_halves_of_each_step(
    tiny_sd: Path,
    fresh_run: FreshRun,
    fresh_interpreter: FreshInterpreter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes are those of one process that computes the halves of each step's rows apart and adds their gradients.

    A process that computes all rows at once adds them in another order, and an activation that lies between two codes
    is rounded to the other one. Later units amplify that: here the first seven of 26 units have the same codes, and
    1.3% of all codes differ. Noise of 1e-7 in the gradients of one process does the same, from the fourteenth unit on.
    """
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    run, other = fresh_run(tiny_sd), fresh_run(tiny_sd)
    flags = ["--bits", "w4a8", "--recipe", str(recipe), "--batch-size", "3", "--device", "cpu", "--quiet"]
    program = tmp_path / "edadm"
    fresh_interpreter.write_program(program, LATE_READER)
    started = torchrun(program, "reconstruct", "--run", str(other.root), *flags)
    monkeypatch.setattr(trainer, "make_step", step_by_halves)
    config = ReconstructConfig(bits=BitWidth.parse("w4a8"), recipe=load_recipe(str(recipe)), batch_size=3, device="cpu")
    reconstruct.run(config, run)
    _, err = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 0, err
    alone, two = run.open("reconstruct", "w4a8"), other.open("reconstruct", "w4a8")
    assert alone.identity == two.identity
    assert payload(alone) == payload(two)


def step_by_halves(learner: UnitLearner, optimization: Optimization) -> Callable[[], Tensor]:
    """A step that computes the rows of the first and of the second of two processes one after the other."""
    whole, groups, size = learner.share, learner.groups, learner.hyperparameters.batch_size

    def step() -> Tensor:
        optimization.decay()
        optimization.adam.zero_grad(set_to_none=True)
        masks, losses = learner.generator.get_state(), []
        for index in range(2):
            team = Processes()
            team.index, team.count = index, 2
            share = Share.of(size, team)
            learner.generator.set_state(masks)
            learner.share = learner.activation_drop.share = learner.input_drop.share = share
            learner.groups = {
                name: [tensor[share.start : share.stop].clone() for tensor in tensors]
                for name, tensors in groups.items()
            }
            loss = learner.loss()
            loss.backward()
            losses.append(loss.detach())
        learner.share = learner.activation_drop.share = learner.input_drop.share = whole
        optimization.adam.step()
        learner.after_step()
        return losses[0] + losses[1]

    return step


def test_an_evaluation_is_the_same_bytes(tiny_ddpm: Path, fresh_run: FreshRun, program: Path) -> None:
    run = fresh_run(tiny_ddpm)
    bits = BitWidth.parse("w8a8")
    recipe = load_recipe("rtn")
    ranges = recipe.ranges.model_copy(update={"num_candidates": 5})
    recipe = recipe.model_copy(update={"ranges": ranges})
    reconstruct.run(ReconstructConfig(bits=bits, recipe=recipe, device="cpu"), run)
    export.run(ExportConfig(bits=bits, parity_samples=1, device="cpu"), run)
    other = RunFolder(run.root.with_name("other"))
    shutil.copytree(run.root, other.root)
    evaluate.run(EvaluateConfig(bits=bits, num_images=5, batch_size=2, device="cpu"), run)
    flags = ["--bits", "w8a8", "--num-images", "5", "--batch-size", "2", "--device", "cpu", "--json"]
    done = accelerate_launch(program, "evaluate", "--run", str(other.root), *flags)
    out, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, err
    assert json.loads(out)["status"] == "done"
    for name in ("w8a8", "full-precision"):
        alone, two = run.open("evaluate", name), other.open("evaluate", name)
        assert payload(alone) == payload(two)
        assert two.manifest.environment["processes"] == 2


# The second process is killed after its second shard, and until then the first one cannot have finished.
DIES_AT_ITS_SECOND_SHARD = """
import os, signal, sys
from edadm_cli.cli.app import main
from edadm_cli.collect import building
write_shard, written = building.write_shard, []
def write_and_die(*arguments):
    write_shard(*arguments)
    written.append(arguments)
    if os.environ["RANK"] == "1" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
building.write_shard = write_and_die
sys.exit(main())
"""


def test_a_process_that_dies_ends_the_run_and_a_restart_goes_on(tiny_sd: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    flags = ["--num-trajectories", "16", "--num-steps", "3", "--batch-size", "2", "--device", "cpu"]
    words = ["collect", "--model", str(tiny_sd), "--prompts", str(prompts), *flags, "--run", str(tmp_path / "run")]
    (tmp_path / "dies.py").write_text(DIES_AT_ITS_SECOND_SHARD)
    started = start(*TORCHRUN, "--", str(tmp_path / "dies.py"), *words)
    out, err = started.communicate(timeout=LIMIT_S)
    assert started.returncode != 0
    assert out == ""
    reported = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert reported == [
        "error: Process 0 of the run was ended, or another one of it died.",
        "hint: type the same command again: it goes on where it was",
    ]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "edadm_cli") not in err
    (partial,) = (tmp_path / "run").glob(".collect.partial-*")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("latents-*.safetensors")}
    assert len(kept) >= 2
    again = collect.run(
        CollectConfig(
            model=str(tiny_sd), prompts=prompts, num_trajectories=16, num_steps=3, batch_size=2, device="cpu"
        ),
        RunFolder(tmp_path / "run"),
    )
    assert again.status == "done"
    actual = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "collect").glob("latents-*")}
    assert {name: actual[name] for name in kept} == kept, "what was there is not sampled again"


def test_a_failure_of_one_process_is_reported_once(tiny_sd: Path, program: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.txt")
    words = ["collect", "--model", str(tiny_sd), "--prompts", absent, "--run", str(tmp_path / "run")]
    done = torchrun(program, *words)
    _, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode != 0
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1
    done = torchrun(program, "select", "--run", str(tmp_path / "run"))
    _, err = done.communicate(timeout=LIMIT_S)
    assert sum("edadm select runs in one process" in line for line in err.splitlines()) == 1
