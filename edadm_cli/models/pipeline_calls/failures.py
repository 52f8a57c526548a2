"""Decides whether a failed sampling is the fault of the model, whose components may not fit each other."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

_LIBRARIES = ("/diffusers/", "/transformers/", "/tokenizers/", "/torch/nn/", "/torch/_")
_OWN = str(Path(__file__).parents[2]).replace("\\", "/")
KINDS = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)
"""The errors that libraries raise about sizes, types and names."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory did not suffice; on a CPU torch raises a `RuntimeError` with a text of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def is_fault_of_model(denoiser: nn.Module, error: BaseException) -> bool:
    """Returns whether an error was raised inside of a library while a model of that library's own layers computed.

    Errors of a quantized denoiser, of the device, and those raised in code of this package are not: they are reported
    as internal errors.
    """
    if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
        return False
    if any(type(module).__module__.startswith("edadm_cli.quant") for module in denoiser.modules()):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    innermost = frames[-1].filename.replace("\\", "/") if frames else ""
    return not innermost.startswith(_OWN) and any(library in innermost for library in _LIBRARIES)
