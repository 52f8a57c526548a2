"""Compiles CUDA C++ to machine code with NVRTC, which torch's CUDA builds include; no GPU is needed."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")
CACHE_VARIABLE = "EDADM_KERNEL_CACHE"


class CompilationError(RuntimeError):
    """NVRTC refused a source; the message includes the log of the compiler."""


def compiled(source: str, defines: Mapping[str, int], prelude: str = "", anew: bool = False) -> bytes:
    """Returns the machine code of a source file of this folder, from the cache if it was compiled before.

    Args:
        source: Name of the file.
        defines: Macros with their values.
        prelude: Text between the common header and the source.
        anew: Whether to ignore the cache, because its code does not load.

    Returns:
        A cubin for compute capability 9.0.

    Raises:
        CompilationError: The source does not compile.
        ImportError: cuda-bindings is not installed.
    """
    from cuda.bindings import nvrtc

    text = "\n".join([source_text("common.cuh"), prelude, source_text(source)])
    options = [*OPTIONS, *(f"-D{name}={value}" for name, value in defines.items())]
    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256("\0".join([text, *options, str(version)]).encode()).hexdigest()
    folder = _cache_folder()
    if folder is None:
        return _compile(text, source, options)
    cached = folder / f"{key}.cubin"
    if not anew:
        try:
            return cached.read_bytes()
        except OSError:
            pass
    code = _compile(text, source, options)
    _store(cached, code)
    return code


def source_text(name: str) -> str:
    """Returns the text of a file of this folder without comments, so that a change of these compiles nothing again."""
    text = files("edadm_kernels.hopper").joinpath(name).read_text(encoding="utf-8")
    return re.sub(r"//.*", "", text)


def _compile(text: str, name: str, options: list[str]) -> bytes:
    """Returns the machine code of a source text."""
    from cuda.bindings import nvrtc

    def checked(result: tuple[object, ...]) -> object:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilationError(f"NVRTC failed on {name} with {result[0]}")
        return result[1] if len(result) > 1 else None

    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        outcome = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        size = checked(nvrtc.nvrtcGetProgramLogSize(program))
        # NVRTC writes in place: a `bytes` of length 1, which an empty log has, would be shared by all of Python
        log = bytearray(int(size))  # type: ignore[call-overload]
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        message = log.decode(errors="replace").strip("\0 \n")
        if outcome[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilationError(f"NVRTC refused {name}: {message}")
        if "C7512" in message or "serialized" in message:
            raise CompilationError(f"NVRTC would serialize the matrix instructions of {name}: {message}")
        size = checked(nvrtc.nvrtcGetCUBINSize(program))
        code = bytearray(int(size))  # type: ignore[call-overload]
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _cache_folder() -> Path | None:
    """Returns the folder of compiled code; `None` for a user without a home, for whom every process compiles anew."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edadm" / "kernels"
    except RuntimeError:
        return None


def _store(path: Path, code: bytes) -> None:
    """Writes a file whole or not at all; nothing happens if the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            target = Path(folder) / path.name
            target.write_bytes(code)
            os.replace(target, path)
    except OSError:
        return
