"""Tests of kernels run where Triton interprets them, so none needs a GPU.

Triton decides between compiling and interpreting when a kernel is defined, once per process. So that other tests of
the same session can compile, a separate process runs these: one per session, or one per xdist worker. It collects this
folder once and then receives the name of one test after another. Modules that launch no kernel say
`INTERPRETED = False`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TextIO

import pytest


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class InterpreterProcess:
    """A process with TRITON_INTERPRET=1 that runs one test at a time."""

    def __init__(self, rootdir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(rootdir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._close)

    def run(self, nodeid: str) -> dict[str, str]:
        """Returns the outcome (passed, failed, skipped) and the text of a test."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(nodeid) + "\n")
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
def _interpreter_process(rootdir: Path) -> InterpreterProcess:
    return InterpreterProcess(rootdir)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Gives the test to the interpreting process, unless this is that process or the test needs none."""
    if _interprets() or not getattr(pyfuncitem.module, "INTERPRETED", True):
        return None
    result = _interpreter_process(pyfuncitem.config.rootpath).run(pyfuncitem.nodeid)
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    if result["outcome"] != "passed":
        pytest.fail(result["text"], pytrace=False)
    return True


class _Server:
    """Runs the tests that are named on standard input, one JSON line each way."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers
        self._errors: list[str] = []
        self._outcome, self._text = "failed", ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(report.longreprtext)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self._requests:
            item = items.get(json.loads(line))
            lost = ["the test was not found by the interpreting process", *self._errors]
            self._outcome, self._text = "failed", "" if item else "\n".join(lost)
            if item is not None:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self._answers.write(json.dumps({"outcome": self._outcome, "text": self._text}) + "\n")
            self._answers.flush()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Stores the first phase that did not pass."""
        if report.when == "setup" or self._outcome == "passed":
            self._outcome, self._text = report.outcome, report.longreprtext


def _serve(rootdir: str) -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(rootdir)
    options = ["--rootdir", rootdir, "--capture=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([str(Path(__file__).parent), *options], plugins=[_Server(requests, answers)])


if __name__ == "__main__":
    _serve(sys.argv[1])
