"""A seeded fuzzer: whatever an artifact holds, a command ends with one sentence, and never believes a wrong hash."""

from __future__ import annotations

import copy
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts import Artifact, RunFolder
from edadm_cli.artifacts.quantization import load_params, load_plan
from edadm_cli.cli.app import main
from edadm_cli.cli.boundary import guard
from edadm_cli.cli.signals import Signals
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.recipe import load_recipe
from tests.integration.survival.mutants import Mutant, mutate, restore
from tests.unit.report.runs import RunMaker
from tests.unit.report.test_report_speed import bench

BITS = BitWidth.parse("w8a8")
COUNT = 200
EXPECTED = (0, 2, 3, 4)
NAMES = {"collect": None, "select": None, "reconstruct": "w8a8", "export": "w8a8", "evaluate": "w8a8", "bench": "b"}


@pytest.fixture(scope="module")
def whole(pristine: Path, tiny_ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an artifact of each kind; the metrics of `evaluate` and the times of `bench` are invented."""
    from edadm_cli.export import stage as export
    from edadm_cli.reconstruct import stage as reconstruct

    root = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(pristine, root)
    run = RunFolder(root)
    reconstruct.run(ReconstructConfig(bits=BITS, recipe=load_recipe("rtn"), device="cpu"), run)
    export.run(ExportConfig(bits=BITS, parity_samples=1, device="cpu"), run)
    maker = RunMaker(root)
    maker.model = run.open("collect").manifest.model
    maker.facts["evaluation.json"]["bits"] = "w8a8"
    maker.make("evaluate", "w8a8")
    _write_bench(maker)
    return root


def _write_bench(maker: RunMaker) -> None:
    from edadm_cli.artifacts import BuildSpec, save_json

    config = {"bits": [{"weight": 8, "activation": 8}], "engine": "openvino", "device": "cpu", "batch_sizes": [1, 4]}
    parents = (maker.run.open("export", "w8a8"),)
    with maker.run.build(BuildSpec("bench", "b", config, 0, parents, maker.model)) as build:
        save_json(build.path / "bench.json", bench())
        build.commit(environment={"device": "cpu"})


@pytest.fixture
def readers(whole: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[RunFolder], Any]]:
    """What the next stage reads of each kind of artifact, without its work."""
    from edadm_cli.select import building as select

    monkeypatch.setattr(select, "draw_selection", lambda path, *_: path.write_bytes(b"plot"))
    denoiser = CollectedRun.open(RunFolder(whole)).load(*_cpu()).denoiser

    def fill(artifact: Artifact) -> None:
        network = copy.deepcopy(denoiser)
        quantize_network(network, load_plan(artifact))
        load_quant_params(network, load_params(artifact))

    return {
        "collect": lambda run: main(["select", "--run", str(run.root), "--force", "-q"]),
        "select": lambda run: CalibrationSet.load(run.open("select")).call(range(1), *_cpu()),
        "reconstruct": lambda run: fill(run.open("reconstruct", "w8a8")),
        "export": lambda run: run.open("export", "w8a8"),
        "evaluate": lambda run: run.open("evaluate", "w8a8"),
        "bench": lambda run: run.open("bench", "b"),
    }


def _cpu() -> tuple[Any, Any]:
    import torch

    return torch.device("cpu"), torch.float32


@pytest.mark.parametrize("kind", NAMES)
def test_no_mutant_ends_in_an_internal_error_or_in_silence(
    kind: str,
    whole: Path,
    readers: dict[str, Callable[[RunFolder], Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    restore(whole, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    name = NAMES[kind]
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    for index in range(COUNT):
        for part in (kind, "select") if kind == "collect" else (kind,):
            restore(whole / part, run.path(part))
        mutant = mutate(run.path(kind, name), f"{kind} {index}")
        commands: tuple[Callable[[], int], ...] = (
            lambda: main(["report", "--run", str(run.root), "-q"]),
            lambda: guard([], lambda: readers[kind](run), Signals()),
            lambda: main(["inspect", str(run.root)]),
        )
        for command in commands[index % 2 :: 2]:
            code = command()
            captured = capsys.readouterr()
            outcomes["accepted" if code == 0 else f"exit {code}"] += 1
            problem = _problem(mutant, code, captured.err)
            if problem is not None:
                problems.append(f"{kind} {index}: {mutant}: {problem}")
    print(f"{kind}: {dict(outcomes)}")
    assert not problems, f"{len(problems)} of {sum(outcomes.values())}:\n" + "\n".join(problems[:10])
    assert outcomes["exit 3"] > COUNT / 2


def _problem(mutant: Mutant, code: int, err: str) -> str | None:
    """What is wrong with the end of a command; `None` where it is right."""
    if code not in EXPECTED or "Traceback" in err or "internal error" in err:
        return f"exit code {code}: {err[-600:]}"
    is_payload = mutant.file != "manifest.json"
    if code == 0 and is_payload and mutant.is_changed and not mutant.agrees:
        return "a wrong hash was not noticed"
    messages = re.findall(r"^error: (.*)$", err, flags=re.MULTILINE)
    if code != 0 and any(len(message) > 1500 for message in messages):
        return f"a message of {max(map(len, messages))} characters"
    return None
