"""Shared parts of the peers whose quantized layers run in torch."""

from __future__ import annotations

import torch

from edadm_cli.bench.contenders.base import Preparation
from edadm_cli.bench.spec import TORCH, Spec

FLOAT8 = "float8"
_FLOAT8_CAPABILITY = (8, 9)


def has_float8(device: torch.device) -> bool:
    """Returns whether a device multiplies matrices of float8 numbers: GPUs of compute capability 8.9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def torch_spec(peer: str, context: Preparation, bits: str, num_weights: int, variant: str = "") -> Spec:
    """Returns the spec of a peer that quantizes some kinds of layers of a torch denoiser, compiled.

    Args:
        peer: Name of the peer.
        context: The input of the preparation.
        bits: `w8a8` or `float8`.
        num_weights: Number of the weights that take one byte each.
        variant: Form of the peer; empty for its only or usual one.
    """
    dtype = context.half or "float32"
    is_cuda = context.device.type == "cuda"
    return Spec(
        name=f"{peer} {bits}{f', {variant}' if variant else ''}",
        engine=peer,
        runs_on=TORCH,
        dtype=dtype,
        bits=bits,
        compiled=True,
        folder=context.denoiser_folder,
        size_mib=context.eight_bit_mib(dtype, num_weights),
        graphs=is_cuda,
        channels_last=True,
        denoiser_class=context.facts.class_path,
        variant=variant,
    )
