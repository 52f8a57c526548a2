"""Estimates the cost of an evaluation from a short sampling at each precision."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import nn

from edadm_cli.artifacts import Estimate, RunFolder
from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.full_precision import KIND, NAME
from edadm_cli.evaluate.request import EvaluationRequest, SamplingPlan, require_machine, resolve
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.quant.layers import quantized_layers

_MIB = 2**20
_FLOAT_BYTES = 4
_SHORT, _LONG = 2, 4
_PROBE_IMAGES = 4
_ACTIVATIONS = 2.0
"""Peak memory in multiples of the weights: the weights, and as much for activations and decoding."""
_COMPARISON_MIB = 200.0
"""Memory of the features of 10,000 real images, and of the distances of 1,000 rows of them to all others."""


def estimate(config: EvaluateConfig, run_folder: RunFolder) -> Estimate:
    """Estimates time, memory and disk from two short samplings; nothing is written.

    Raises:
        InputError: The export is missing or broken.
    """
    require_machine(config)
    return probe(resolve(config, run_folder))


def probe(request: EvaluationRequest) -> Estimate:
    """Times a few steps of a few images with each pipeline that is still to be sampled."""
    loaders = [request.load_quantized]
    if not request.run.has(KIND, NAME):
        loaders.append(request.load_full_precision)
    seconds, weights, disk = 0.0, 0, 0
    for load in loaders:
        started = time.perf_counter()
        model = load()
        seconds += time.perf_counter() - started
        spent, samples = _seconds_an_image(model, request.sampling)
        seconds += spent * len(request.sampling)
        weights = max(weights, _weight_bytes(model))
        disk += (_bytes(samples) // len(samples.images)) * len(request.sampling)
    return Estimate(
        seconds=seconds,
        memory_mib=weights * _ACTIVATIONS / _MIB + _COMPARISON_MIB,
        disk_mib=disk / _MIB,
    )


def _seconds_an_image(model: LoadedModel, plan: SamplingPlan) -> tuple[float, Samples]:
    """Returns the seconds per image, extrapolated from two samplings of different length, and the samples."""
    count = min(_PROBE_IMAGES, plan.batch_size)
    short, _ = _timed(model, plan, count, _SHORT)
    long, samples = _timed(model, plan, count, _LONG)
    a_step = max(0.0, (long - short) / (_LONG - _SHORT))
    return (short + a_step * (plan.num_steps - _SHORT)) / count, samples


def _timed(model: LoadedModel, plan: SamplingPlan, count: int, num_steps: int) -> tuple[float, Samples]:
    start = time.perf_counter()
    samples = sample(
        model,
        seeds=plan.seeds[:count],
        prompts=None if plan.prompts is None else plan.prompts[:count],
        num_steps=num_steps,
        guidance_scale=plan.guidance_scale,
    )
    return time.perf_counter() - start, samples


def _bytes(samples: Samples) -> int:
    return samples.images.nbytes + samples.latents.nbytes


def _weight_bytes(model: LoadedModel) -> int:
    parts: dict[str, Any] = model.pipeline.components
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]
    held = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
    dequantized = [layer for module in modules for layer in quantized_layers(module).values()]
    return held + sum(_FLOAT_BYTES * math.prod(layer.weight_shape) for layer in dequantized)
