"""Every test here runs where Triton interprets kernels, so none needs a GPU.

Triton decides between compiling and interpreting when a kernel is defined, once for a process. So that other tests of
the same session can compile, these are carried out by a process of their own: one a session, or one an xdist worker,
which is told test after test.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class InterpreterProcess:
    """A process with TRITON_INTERPRET=1 that runs one test at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._close)

    def run(self, nodeid: str, rootdir: Path) -> dict[str, str]:
        """Outcome (passed, failed, skipped) and text of a test."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([nodeid, str(rootdir)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            return {"outcome": "failed", "text": f"the interpreting process died in {nodeid}"}
        result: dict[str, str] = json.loads(answer)
        return result

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@cache
def _interpreter_process() -> InterpreterProcess:
    return InterpreterProcess()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Hand the test to the interpreting process, unless this is it."""
    if _interprets():
        return None
    result = _interpreter_process().run(pyfuncitem.nodeid, pyfuncitem.config.rootpath)
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    if result["outcome"] != "passed":
        pytest.fail(result["text"], pytrace=False)
    return True


class _Recorder:
    """Keeps the first phase of a test that did not pass."""

    def __init__(self) -> None:
        self.outcome, self.text = "failed", "the test was not found by the interpreting process"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.text = report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" or self.outcome == "passed":
            self.outcome, self.text = report.outcome, report.longreprtext


def _serve() -> None:
    """Run the tests named on standard input, one JSON line each way."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        nodeid, rootdir = json.loads(line)
        os.chdir(rootdir)
        recorder = _Recorder()
        pytest.main([nodeid, "--rootdir", rootdir, "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[recorder])
        answers.write(json.dumps({"outcome": recorder.outcome, "text": recorder.text}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
