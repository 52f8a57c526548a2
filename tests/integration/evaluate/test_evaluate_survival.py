"""An evaluation that is killed, and two at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.collect import stage as collect_stage
from edadm_cli.config import BitWidth, CollectConfig, EvaluateConfig
from edadm_cli.errors import InputError
from edadm_cli.evaluate import stage
from tests.integration.fresh_interpreter import FreshInterpreter, Running

Exporter = Callable[[RunFolder, float], Artifact]
STOPS_IN_A_BATCH = """
import sys, time
from pathlib import Path
import edadm_cli.evaluate.images as images
from edadm_cli.artifacts import RunFolder
from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate import stage

allowed, save = int(sys.argv[3]), images.save_tensors
def slow(path, tensors):
    global allowed
    if allowed == 0:
        print("in a batch", flush=True)
        time.sleep(600)
    allowed -= 1
    save(path, tensors)
images.save_tensors = slow
stage.run(EvaluateConfig.model_validate_json(sys.argv[1]), RunFolder(Path(sys.argv[2])))
"""


@pytest.fixture
def folder_run(tmp_path: Path, tiny_ddpm: Path, export_noisy: Exporter) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    collect_stage.run(CollectConfig(model=str(tiny_ddpm), num_trajectories=2, num_steps=2, batch_size=2), run)
    export_noisy(run, 0.05)
    return run


CONFIG = EvaluateConfig(bits=BitWidth(weight=4, activation=8), num_images=9, batch_size=3, device="cpu")


@contextmanager
def _stopped(interpreter: FreshInterpreter, run: RunFolder, allowed: int) -> Iterator[Running]:
    """Run an evaluation in another process that stops for good after some batches; kill it at the end."""
    running = interpreter.start(STOPS_IN_A_BATCH, CONFIG.model_dump_json(), run.root, allowed)
    try:
        assert running.stdout.readline() == "in a batch\n"
        yield running
    finally:
        assert running.kill() == -signal.SIGKILL
        running.close()


def _payload(run: RunFolder) -> dict[str, str]:
    artifacts = [run.open("evaluate", name) for name in ("full-precision", "w4a8")]
    return {f"{a.path.name}/{file.path}": file.sha256 for a in artifacts for file in a.manifest.payload}


@pytest.mark.parametrize("allowed", [2, 4])  # of three batches at full precision and three quantized ones
def test_a_killed_evaluation_ends_with_the_same_bytes(
    folder_run: RunFolder, allowed: int, fresh_interpreter: FreshInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with _stopped(fresh_interpreter, folder_run, allowed):
        pass
    assert not folder_run.has("evaluate", "w4a8")
    assert len(list(folder_run.path("evaluate").rglob("batch-*.safetensors"))) == allowed
    assert stage.run(CONFIG, folder_run).status == "done"
    resumed = _payload(folder_run)
    stage.run(CONFIG, folder_run, force=True)
    assert _payload(folder_run) == resumed


def test_a_second_evaluation_of_the_same_export_is_told_of_the_first(
    folder_run: RunFolder, fresh_interpreter: FreshInterpreter
) -> None:
    with (
        _stopped(fresh_interpreter, folder_run, 4) as first,
        pytest.raises(InputError, match=f"pid {first.pid}"),
    ):
        stage.run(CONFIG, folder_run)
