"""The script of a GPU session, section by section on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STUDIES = Path(__file__).parents[3] / "benchmarks"
SECTIONS = "environment,tests,exactness,times,profile,memory,attention,norms,sweep,tuned"


@pytest.fixture
def gpu_session(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import importlib

    return importlib.import_module("gpu_session")


def test_every_section_runs(gpu_session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "session.jsonl"
    limits = [f"{name}=600" for name in SECTIONS.split(",")]  # a busy machine takes longer than a GPU's session may
    patience = ["--seconds", *limits, "--patience", "9000"]
    monkeypatch.setattr("sys.argv", ["gpu_session.py", "--smoke", "--sections", SECTIONS, "--out", str(out), *patience])
    gpu_session.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "error" in row or "stopped" in row]
    sections = {row["section"] for row in rows}
    assert set(SECTIONS.split(",")) <= sections
    exact = next(row for row in rows if row["section"] == "exactness" and "wrong" in row)
    assert exact["calls"] > 30
    assert exact["wrong"] == 0
    contenders = [row["contender"] for row in rows if row["section"] == "times" and "contender" in row]
    assert {"fp32 eager", "fp16 channels_last eager", "w8a8", "w4a8"} <= set(contenders)
    swept = [row for row in rows if row["section"] == "sweep" and "call" in row]
    assert all(row["layers"] and row["float16_us"] > 0 for row in swept)


def test_no_time_left_is_said(gpu_session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "session.jsonl"
    arguments = ["--smoke", "--sections", "sweep", "--patience", "10", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu_session.py", *arguments])
    gpu_session.main()
    assert json.loads(out.read_text()) == {"section": "sweep", "skipped": "no time left"}


def test_the_best_tiles_are_those_of_a_whole_step(gpu_session: ModuleType) -> None:
    key = (90, "linear", 512, 1280, 1280, False)
    swept = [
        {"key": key, "count": 3, "chosen_us": 10.0, "tiles": {"A": 8.0, "B": 9.0}},
        {"key": key, "count": 1, "chosen_us": 10.0, "tiles": {"A": 14.0, "B": 9.0}},
        {"call": "another", "error": "does not compile"},
    ]
    assert gpu_session.kernels.best_tiles(swept) == {key: ("B", 40.0, 36.0)}


def test_a_session_on_a_new_gpu_writes_its_tuning(gpu_session: ModuleType, tmp_path: Path) -> None:
    import tile_table

    from edadm_kernels import tuning
    from edadm_kernels.tiles import shipped

    fast, slow = (repr(tile) for tile in shipped(120)[:2])
    lines: list[dict[str, Any]] = [
        {"section": "environment", "torch": "2.11.0", "triton": "3.6.0"},
        {"section": "environment", "gpu": "a new GPU", "arch": 120, "multiprocessors": 170},
    ]
    swept = {"section": "sweep", "count": 1, "chosen_us": 9.0}
    lines.append({**swept, "key": (120, "linear", 8, 64, 64, False), "tiles": {fast: 5.0, slow: 9.0}})
    lines.append({**swept, "key": (120, "conv", 8, 8, 64, False), "tiles": {fast: 8.9}})
    session = tmp_path / "session.jsonl"
    session.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arch in tuning.architectures():
        (tmp_path / f"sm_{arch}.json").write_bytes((tile_table.TARGET / f"sm_{arch}.json").read_bytes())
    written = tile_table.write(session, tmp_path)
    assert written.name == "sm_120.json"
    new = tuning.parse(json.loads(written.read_text()), written.name)
    assert (new.gpu, new.instruction, new.machine.multiprocessors) == ("a new GPU", "mma", 170)
    tile = shipped(120)[0]
    assert new.fastest == {("linear", 8, 64, 64): (tile.bm, tile.bn, tile.bk, 1)}, "a gain of 1% is none"


def test_what_is_written_again_is_the_shipped_file() -> None:
    from edadm_kernels import tuning

    for arch in tuning.architectures():
        text = (Path(tuning.__file__).parent / f"sm_{arch}.json").read_text()
        assert tuning.as_json(json.loads(text)) == text


_CASE = """
import sys, time
print("compiled", flush=True)
if sys.argv[1] == "quick":
    sys.stdin.readline()
    print("{}", flush=True)
time.sleep(60)
"""


def test_an_interrupted_measurement_leaves_no_process(gpu_session: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import processes

    started: list[Any] = []
    start = processes.Running.start
    monkeypatch.setattr(processes.Running, "start", lambda *args: started.append(start(*args)) or started[-1])
    lines = processes.measure(["quick", "slow"], [sys.executable, "-c", _CASE], at_once=2, cap=60, seconds=60)
    assert json.loads(next(lines)) == {"case": "quick"}
    lines.close()  # type: ignore[attr-defined]
    assert len(started) == 2
    assert all(case.process.poll() is not None for case in started)


@pytest.mark.parametrize("text", ["print(1)", "Tile(64, 64, 64, 4, 3)", "Tile(bm=print(1))", "1 + 1"])
def test_a_tile_in_a_session_is_read_and_not_run(
    text: str, gpu_session: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from edadm_kernels.tiles import shipped

    tile = shipped(90)[0]
    assert gpu_session.kernels.tile_of(repr(tile)) == tile
    with pytest.raises(ValueError, match=r"expected, found|malformed"):
        gpu_session.kernels.tile_of(text)
    assert capsys.readouterr().out == ""
