"""The full-precision contenders: everything that a sceptic would run instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from edadm_cli.bench.contender import TORCH, Call, Setting, Spec, placed
from edadm_cli.bench.quantized import folder_mib
from edadm_cli.bench.verdict import FP32_EAGER
from edadm_cli.engines.base import EngineOptions, FileEngine
from edadm_cli.engines.registry import engine as engine_of

_OPENVINO = "openvino"


def torch_specs(
    denoiser: nn.Module, folder: Path, device: torch.device, half: str | None, compiled: bool
) -> list[Spec]:
    """Torch: float32 in eager mode; half precision eager, on CUDA in CUDA graphs, and compiled.

    Args:
        denoiser: For its size.
        folder: Where it is saved.
        device: On CUDA compiled code runs in CUDA graphs.
        half: The half-precision type; `None` where the processor has none, and float32 is compiled.
        compiled: Whether torch.compile takes part.
    """
    is_cuda = device.type == "cuda"
    wanted = [(FP32_EAGER, "float32", False, False)]
    if half is not None:
        wanted.append((f"torch {half}", half, False, False))
        wanted += [(f"torch {half}, CUDA graph", half, False, True)] if is_cuda else []
    if compiled:
        kind = half or "float32"
        graph = ", CUDA graph" if is_cuda else ""
        wanted.append((f"torch {kind}, compiled{graph}", kind, True, is_cuda))
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return [
        Spec(
            name=name,
            engine=TORCH,
            runs_on=TORCH,
            dtype=dtype,
            bits=None,
            compiled=is_compiled,
            folder=folder,
            size_mib=count * torch.empty(0, dtype=getattr(torch, dtype)).element_size() / 2**20,
            graphs=graphs,
            channels_last=dtype != "float32",
        )
        for name, dtype, is_compiled, graphs in wanted
    ]


def openvino_specs(denoiser: nn.Module, call: Call, setting: Setting, half: str | None, folder: Path) -> list[Spec]:
    """The CPU engine at full precision, so that its own merits are not taken for those of integers."""
    device = torch.device(setting.device)
    if device.type != "cpu":
        return []  # nor need it be installed
    engine = engine_of(_OPENVINO)
    assert isinstance(engine, FileEngine)
    args, kwargs = placed(call, device, torch.float32)
    engine.save(denoiser, args, kwargs, EngineOptions(device), folder)
    types: Sequence[str] = ["float32", *([half] if half is not None else [])]
    return [
        Spec(
            name=f"{_OPENVINO} {dtype}",
            engine=_OPENVINO,
            runs_on=_OPENVINO,
            dtype=dtype,
            bits=None,
            compiled=True,
            folder=folder,
            size_mib=folder_mib(folder),
        )
        for dtype in types
    ]
