"""What `edadm push` says when the hub, the network or the disk refuses: against a hub on this machine."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edadm_cli.errors import EdadmError, InputError, MachineError
from edadm_cli.export.hub_errors import explain_hub_error
from edadm_cli.export.push import Upload, prepare, push
from tests.unit.report.runs import RunMaker

REPOSITORY = "someone/tiny-w4a8"


class Hub:
    """A hub that knows one login and answers the creation of a repository with a status.

    Attributes:
        login: The status of the question who is logged in.
        create: The status of the creation of a repository.
    """

    def __init__(self) -> None:
        self.login, self.create = 200, 403
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(hub.login if "whoami" in self.path else hub.create)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(hub.create)

            def answer(self, status: int) -> None:
                body = b'{"name": "me", "error": "the words of the hub"}'
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    maker = RunMaker(tmp_path / "run")
    maker.facts["evaluation.json"]["grid"] = "images/0-full.png"
    maker.calibration().width("w4a8")
    return prepare(maker.run.path("export", "w4a8"), REPOSITORY)


@pytest.mark.parametrize(
    ("login", "create", "words"),
    [
        (401, 200, "does not accept the login"),
        (200, 404, "no repository 'someone/tiny-w4a8' that this login may see"),
        (200, 403, "may not write to 'someone/tiny-w4a8'"),
        (200, 400, "refuses the upload to 'someone/tiny-w4a8': "),
        (200, 429, "too many requests"),
        (200, 503, "itself fails with status 503"),
    ],
)
def test_each_refusal_of_the_hub_has_a_sentence(hub: Hub, upload: Upload, login: int, create: int, words: str) -> None:
    hub.login, hub.create = login, create
    with pytest.raises(InputError, match=words) as raised:
        push(upload, private=False)
    assert "reached" not in raised.value.message
    assert "\n" not in raised.value.message
    if create in (400, 403):
        assert "the words of the hub" in raised.value.message


def test_without_a_network_nothing_is_uploaded(hub: Hub, upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached from here"):
        push(upload, private=False)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "card"), MachineError, "card: the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "unet"), InputError, "unet: there is no such file"),
        (RuntimeError("a part is lost"), InputError, "RuntimeError: a part is lost"),
        (TimeoutError(), InputError, "cannot be reached"),
    ],
)
def test_what_is_not_of_the_network_is_not_said_to_be(error: Exception, kind: type[EdadmError], words: str) -> None:
    explained = explain_hub_error(error, REPOSITORY)
    assert isinstance(explained, kind)
    assert words in explained.message
