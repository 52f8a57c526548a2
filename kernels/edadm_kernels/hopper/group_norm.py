"""Decides which GroupNorms `group_norm.cu` computes and how it divides them into blocks, and launches it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from edadm_kernels.hopper.driver import launch

_VECTOR = 8  # channels in 16 bytes of float16
_MOST_GROUPS = 64
# The largest numbers of chunks per sample and of vectors per thread; the first pair that a shape fits into is used.
_LIMITS = ((64, 4), (128, 8), (256, 8), (512, 8))
_MULTIPROCESSORS = 132
THREADS = 512


@dataclass(frozen=True)
class GroupNormPlan:
    """How the `[pixels, channels]` of one sample are divided into chunks.

    The plan does not depend on the batch, so neither do the codes of a sample.

    Args:
        pixels: Pixels per sample.
        channels: Channels per pixel.
        first: Number of channels of the first of two images; all channels if there is one image.
        groups: Number of groups of channels.
        chunks: Chunks per sample.
        chunk_pixels: Pixels per chunk; the last chunk may have fewer.
        vectors: 16-byte vectors per thread.
    """

    pixels: int
    channels: int
    first: int
    groups: int
    chunks: int
    chunk_pixels: int
    vectors: int

    def repeat(self, samples: int) -> int:
        """Returns how many chunks a block processes, so that all blocks of a batch run at once: a power of two."""
        chunks = self.chunks * samples
        if chunks <= _MULTIPROCESSORS * self.resident(1):
            return 1
        repeat = 2
        while repeat < self.chunks and samples * -(-self.chunks // repeat) > _MULTIPROCESSORS * self.resident(repeat):
            repeat *= 2
        return repeat

    def resident(self, repeat: int) -> int:
        """Returns the blocks of a multiprocessor that have enough registers; a block that repeats holds two chunks."""
        return 2 if self.vectors <= (4 if repeat == 1 else 3) else 1


@dataclass(frozen=True)
class GroupNormVariant:
    """Compile-time parameters of `group_norm.cu`.

    Args:
        name: The name of one of the two kernels.
        plan: How a sample is divided into blocks.
        quantizers: Number of quantizers, 1 to 3; with 0 the result is written in float16.
        silu: Whether SiLU is applied.
        half_affine: Whether weight and bias are float16 and not float32.
        repeat: Chunks that a block processes one after the other.
        raw: Whether the last quantizer takes the input as it is.
    """

    name: Literal["group_statistics", "group_apply"]
    plan: GroupNormPlan
    quantizers: int = 0
    silu: bool = False
    half_affine: bool = False
    repeat: int = 1
    raw: bool = False

    source = "group_norm.cu"
    shared_bytes = 0
    cluster = 1

    @property
    def threads(self) -> int:
        """Returns the threads per block."""
        return THREADS

    def defines(self) -> dict[str, int]:
        """Returns the macros that the source is compiled with."""
        return {
            "STATISTICS": int(self.name == "group_statistics"),
            "THREADS": THREADS,
            "BLOCKS": 1 if self.raw and self.repeat > 1 else self.plan.resident(self.repeat),
            "PIXELS": self.plan.pixels,
            "CHANNELS": self.plan.channels,
            "FIRST": self.plan.first,
            "GROUPS": self.plan.groups,
            "CHUNKS": self.plan.chunks,
            "CHUNK_PIXELS": self.plan.chunk_pixels,
            "VECTORS": self.plan.vectors,
            "QUANTIZERS": self.quantizers,
            "SILU": int(self.silu),
            "HALF_AFFINE": int(self.half_affine),
            "REPEAT": self.repeat,
            "RAW": int(self.raw),
        }

    def prelude(self) -> str:
        """Returns the text before the source, which is empty."""
        return ""

    def label(self) -> str:
        """Returns the name of the variant for tables."""
        end = "" if self.name == "group_statistics" else f"-q{self.quantizers}" + "-silu" * self.silu
        end += "-half" * self.half_affine + "-raw" * self.raw + f"-x{self.repeat}" * (self.repeat > 1)
        channels = f"{self.plan.channels}"
        if self.plan.first < self.plan.channels:
            channels = f"{self.plan.first}+{self.plan.channels - self.plan.first}"
        return f"{self.name.replace('_', '-')}-{self.plan.pixels}x{channels}{end}"


@lru_cache(maxsize=256)
def group_norm_plan(pixels: int, channels: int, num_groups: int, first: int | None = None) -> GroupNormPlan | None:
    """Returns the plan for a shape; `None` if groups are too narrow, or rows or images too large for the kernels.

    Args:
        pixels: Pixels per sample.
        channels: Channels per pixel.
        num_groups: Number of groups of channels.
        first: Number of channels of the first of two images; `None` if there is one image.
    """
    across, first = channels // _VECTOR, channels if first is None else first
    if channels % _VECTOR or first % _VECTOR or channels // num_groups < _VECTOR or num_groups > _MOST_GROUPS:
        return None
    if across > THREADS:
        return None
    rows_at_once = THREADS // across
    for most_chunks, most_vectors in _LIMITS:
        chunk_pixels = -(-pixels // most_chunks)
        vectors = -(-chunk_pixels // rows_at_once)
        if vectors <= most_vectors:
            return GroupNormPlan(pixels, channels, first, num_groups, -(-pixels // chunk_pixels), chunk_pixels, vectors)
    return None


# Height (equal to the width) and channels of the inputs in the U-Net of Stable Diffusion 1.x that are too large for one
# kernel in Triton; then height, first and second channels where the up blocks read two images.
_SHAPES = ((64, 320), (32, 640), (16, 1280))
_JOINED = (
    *((64, 640, 320), (64, 320, 320), (32, 1280, 640), (32, 640, 640), (32, 640, 320)),
    *((16, 1280, 1280), (16, 1280, 640)),
)
_FORMS = ((False, False), (False, True), (True, False), (True, True))  # with SiLU, with float16 weights and biases


def variants() -> list[GroupNormVariant]:
    """Lists what the normalizations of a Stable Diffusion 1.x denoiser compile."""
    shapes = [(size, channels, channels) for size, channels in _SHAPES]
    shapes += [(size, first + second, first) for size, first, second in _JOINED]
    candidates = (group_norm_plan(size * size, channels, 32, first) for size, channels, first in shapes)
    plans = [plan for plan in candidates if plan is not None]
    listed: list[GroupNormVariant] = []
    for plan in plans:
        repeats = sorted({plan.repeat(samples) for samples in (2, 16)})
        listed += [GroupNormVariant("group_statistics", plan, repeat=repeat) for repeat in repeats]
        for repeat in repeats:
            forms = _FORMS if repeat == repeats[0] else _FORMS[-1:]  # what differs does not concern the repetition
            listed += [GroupNormVariant("group_apply", plan, 1, silu, half, repeat) for silu, half in forms]
            if plan.first < plan.channels:  # a residual block with a shortcut
                listed.append(GroupNormVariant("group_apply", plan, 2, True, repeat=repeat, raw=True))
    return listed


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "more", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("scales", "zero_points", "shifts", "partials")),
        ("out", ctypes.c_void_p * 3),
        ("eps", ctypes.c_float),
        ("quant_max", ctypes.c_float),
    )


def takes(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, more: Tensor | None = None) -> bool:
    """Returns whether `launch_group_norm` supports these types and shapes."""
    types = x.dtype == torch.float16 and weight.dtype == bias.dtype and weight.dtype in (torch.float16, torch.float32)
    return (
        types
        and all(t is None or t.data_ptr() % 16 == 0 for t in (x, more, weight, bias))
        and _plan(x, more, num_groups) is not None
    )


def _plan(x: Tensor, more: Tensor | None, num_groups: int) -> GroupNormPlan | None:
    """Returns the plan for one or two images."""
    channels = x.shape[1] + (0 if more is None else more.shape[1])
    return group_norm_plan(x.shape[2] * x.shape[3], channels, num_groups, x.shape[1])


def launch_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    outputs: list[Tensor],
    quantizers: tuple[Tensor, Tensor, int] | None = None,
    more: Tensor | None = None,
    raw: bool = False,
) -> None:
    """Fills `outputs`; the arguments are those of `group_norm_quantize`, checked and accepted by `takes`.

    Args:
        x: The image.
        weight: `[C]`.
        bias: `[C]`.
        num_groups: Number of groups of channels; it divides C.
        eps: The number that is added to the variance.
        silu: Whether SiLU is applied.
        outputs: Codes, one tensor per quantizer; or one float16 tensor.
        quantizers: Scales, zero-points and bits; inverses of scales, if zero-points are float32 and of signed codes;
            `None` if the result is written in float16.
        more: The image with the channels that follow.
        raw: Whether the last output has the codes of the input as it is; there are at least two.
    """
    samples, plan = x.shape[0], _plan(x, more, num_groups)
    assert plan is not None
    partials = x.new_empty((samples, num_groups, plan.chunks, 2), dtype=torch.float32)
    scales, offsets, num_bits = quantizers or (None, None, 8)
    is_signed = offsets is not None and offsets.is_floating_point()
    zero_points, shifts = (None, offsets) if is_signed else (offsets, None)
    problem = _Problem(
        *(None if t is None else t.data_ptr() for t in (x, more, weight, bias, scales, zero_points, shifts, partials)),
        (ctypes.c_void_p * 3)(*(output.data_ptr() for output in outputs)),
        eps,
        float((1 << num_bits) - 1),
    )
    repeat, device = plan.repeat(samples), x.device.index or 0
    blocks = samples * -(-plan.chunks // repeat)
    launch(GroupNormVariant("group_statistics", plan, repeat=repeat), blocks, [problem], device)
    count, is_half = len(outputs) if quantizers else 0, weight.dtype == torch.float16
    launch(GroupNormVariant("group_apply", plan, count, silu, is_half, repeat, raw), blocks, [problem], device)
