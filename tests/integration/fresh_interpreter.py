"""A program that has imported diffusers and nothing of this project, and forks for every script that it runs.

Each script runs in a separate process, which may die, and finds an interpreter in which nothing of this project is
loaded; the time of the imports is spent once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
SEED, NUM_STEPS = 4, 2
# Variables by which a command silences the processes that it starts; the libraries read them when they are imported.
SILENCING = ("PYTHONWARNINGS", "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
ROUND_TRIP = """
import json, sys
from fresh_interpreter import round_trip
print(json.dumps(round_trip(**json.loads(sys.argv[1]))))
"""
# A program that has its script run there: with its own arguments, folder, environment and streams.
PROGRAM = """#!{python} -S
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = {{"script": {script!r}, "arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(connection.makefile().read().split()[1]))
"""


class Running:
    """A script that runs in a separate process."""

    def __init__(self, connection: socket.socket, output: int) -> None:
        self._answers = connection.makefile()
        self.stdout = os.fdopen(output)
        self.pid = int(self._answers.readline())

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return int(self._answers.readline())

    def kill(self) -> int:
        """`kill -9`, and what `wait` gives."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        """Let go of its output."""
        self.stdout.close()
        self._answers.close()


class FreshInterpreter:
    """The program, started."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = str(Path(self._folder.name) / "socket")
        environment = {name: value for name, value in os.environ.items() if name not in SILENCING}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, script: str, *arguments: object, cwd: Path | None = None) -> Running:
        """Run a script as `python -c SCRIPT ARGUMENTS` would."""
        request = {"script": script, "arguments": list(map(str, arguments)), "cwd": str(cwd or ROOT)}
        reading, writing = os.pipe()
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.connect(self._address)
            message = json.dumps(request).encode() + b"\n"
            socket.send_fds(connection, [message], [nothing.fileno(), writing, 2])
            os.close(writing)
            return Running(connection, reading)

    def run(self, script: str, *arguments: object, cwd: Path | None = None) -> int:
        """Run a script to its end, for what `wait` gives."""
        running = self.start(script, *arguments, cwd=cwd)
        running.stdout.read()
        code = running.wait()
        running.close()
        return code

    def ask(self, **request: Any) -> dict[str, Any]:
        """What `round_trip` returns there."""
        running = self.start(ROUND_TRIP, json.dumps(request))
        text = running.stdout.read()
        code = running.wait()
        running.close()
        assert code == 0, "the round trip failed; what it says stands on stderr"
        answer: dict[str, Any] = json.loads(text)
        return answer

    def write_program(self, path: Path, script: str) -> None:
        """Write a program that has `script` run there."""
        path.write_text(PROGRAM.format(python=sys.executable, address=self._address, script=script))
        path.chmod(0o755)

    def close(self) -> None:
        """End the program."""
        self._process.communicate()
        self._folder.cleanup()


def image_digest(pipeline: Any, arguments: dict[str, Any]) -> str:
    """Returns the hash of the image that a pipeline generates from one seed."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(SEED)]
    images = pipeline(**arguments, num_inference_steps=NUM_STEPS, generator=generator, output_type="np").images
    return sha256(images.tobytes()).hexdigest()


def round_trip(folder: str, again: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Loads an export with plain diffusers, generates, saves it, loads that, generates again, and casts it."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    classes = [type(part).__name__ for part in (pipeline, denoiser, pipeline.scheduler)]
    layers = sum(type(module).__name__ == "QuantizedLayer" for module in denoiser.modules())
    first = image_digest(pipeline, arguments)
    pipeline.save_pretrained(again)
    second = image_digest(DiffusionPipeline.from_pretrained(again), arguments)
    buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers() if name.endswith("_scale")}
    pipeline.to(torch.bfloat16)
    cast = dict(denoiser.named_buffers())
    return {
        "classes": classes,
        "layers": layers,
        "images": [first, second],
        "scales": len(buffers),
        "scales_kept": all(torch.equal(cast[name], buffer) for name, buffer in buffers.items()),
        "scale_dtypes": sorted({str(cast[name].dtype) for name in buffers}),
        "dtypes": sorted({str(parameter.dtype) for parameter in denoiser.parameters()}),
    }


def _serve(address: str) -> None:
    if not any(entry.name == "edadm" for entry in importlib.metadata.entry_points(group="torch.backends")):
        import edadm_cli  # noqa: F401 - installed, the package is found through its entry point
    import torch  # noqa: F401
    from diffusers import DDIMPipeline, StableDiffusionPipeline  # noqa: F401 - with the modules behind the names
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:  # its end: the tests are over
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _attend(connection)
            connection.close()


def _attend(connection: socket.socket) -> NoReturn:
    """Starts what a connection requests, reports its process id, waits for it, and reports how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        connection.close()
        _run(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(request: Mapping[str, Any], streams: list[int]) -> NoReturn:
    code: object = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["cwd"])
        if "environment" in request:
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["script"], "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - whatever it was, as the interpreter would have it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve(sys.argv[1])
