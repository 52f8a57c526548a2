"""How `benchmarks/learner.py` judges a quantized denoiser: on trajectories that it has not learned from.

Their noise is new; their prompts are those of the calibration trajectories.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import RunFolder, Units
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed
from edadm_cli.quant.network import load_quant_params, quantize_network
from edadm_cli.reconstruct.unit_data import channel_loss


def judge(folder: RunFolder, bits: str, seed: int, images: int, device: str) -> dict[str, Any]:
    """Compares a quantized denoiser with full precision: on the steps of other trajectories, and at their ends.

    Args:
        folder: The run with the reconstruction.
        bits: The name of the reconstruction.
        seed: The seed of the trajectories.
        images: Number of trajectories.
        device: The device that computes.
    """
    artifact, sampling = folder.open("reconstruct", bits), CollectedRun.open(folder)
    exact, quantized = (CollectedRun.open(folder).load(torch.device(device), torch.float32) for _ in range(2))
    quantize_network(quantized.denoiser, load_plan(artifact))
    load_quant_params(quantized.denoiser, artifact.tensors("quant_params.safetensors"))
    prompts = sampling.prompts
    guidance = sampling.guidance_scale
    sampled = partial(
        sample,
        seeds=[image_seed(seed, index, EVALUATION) for index in range(images)],
        prompts=None if prompts is None else [prompts[index % len(prompts)] for index in range(images)],
        num_steps=sampling.num_steps,
        guidance_scale=guidance,
    )
    units = Units.load(artifact).units
    with one_step_errors(exact, quantized.denoiser, [unit.name for unit in units], guidance) as errors:
        reference = sampled(exact)
    final = sampled(quantized).latents
    distance = (final - reference.latents).flatten(1).norm(dim=1) / reference.latents.flatten(1).norm(dim=1)
    return {**errors.summary(), "final": float(distance.mean()), "final_bias": _bias(final - reference.latents)}


class Errors:
    """Squared errors of the prediction and of every unit, summed over calls."""

    def __init__(self, guidance: float | None) -> None:
        self.guidance = guidance
        self.steps: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.units: dict[str, list[float]] = defaultdict(list)
        self.bias: list[float] = []
        self.coherence: list[float] = []
        self._last: Tensor | None = None

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        """Takes the predictions `[rows, ...]` of one call."""
        self._add("one_step", exact, quantized)
        if self.guidance is not None:
            exact, quantized = self._combine(exact), self._combine(quantized)
            self._add("guided", exact, quantized)
        error = (quantized - exact).double()
        self.bias.append(_bias(error))
        if self._last is not None and len(self._last) == len(error):
            cosine = torch.nn.functional.cosine_similarity(error.flatten(1), self._last.flatten(1))
            self.coherence.append(float(cosine.mean()))
        self._last = error

    def summary(self) -> dict[str, Any]:
        """Returns relative L2 errors over all steps, those of each step, and the summed unit losses."""
        metrics: dict[str, Any] = {
            name: (sum(error for error, _ in steps) / sum(size for _, size in steps)) ** 0.5
            for name, steps in self.steps.items()
        }
        metrics |= {f"{name}_by_step": [(e / s) ** 0.5 for e, s in steps] for name, steps in self.steps.items()}
        losses = {name: statistics.mean(values) for name, values in self.units.items()}
        metrics |= {"bias": statistics.mean(self.bias), "coherence": statistics.mean(self.coherence or [0.0])}
        return {**metrics, "held_out": sum(losses.values()), "by_unit": losses}

    def _combine(self, prediction: Tensor) -> Tensor:
        unconditional, conditional = prediction.chunk(2)
        assert self.guidance is not None
        return unconditional + self.guidance * (conditional - unconditional)

    def _add(self, name: str, exact: Tensor, quantized: Tensor) -> None:
        pair = (quantized.double() - exact.double()).square().sum(), exact.double().square().sum()
        self.steps[name].append((float(pair[0]), float(pair[1])))


@contextmanager
def one_step_errors(
    model: LoadedModel, quantized: nn.Module, units: Sequence[str], guidance: float | None
) -> Iterator[Errors]:
    """Runs the quantized denoiser on every call of the full-precision one while entered."""
    errors = Errors(guidance)
    outputs: list[dict[str, list[Tensor]]] = [{}, {}]

    def keep(side: int, name: str) -> Any:
        return lambda _, __, output: outputs[side].update({name: _parts(output)})

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        other = quantized(*args, **kwargs)
        errors.add(_prediction(output), _prediction(other))
        for name in units:
            pairs = zip(outputs[1][name], outputs[0][name], strict=True)
            errors.units[name].append(sum(float(channel_loss(*pair)) for pair in pairs))

    with ExitStack() as stack:
        for side, denoiser in enumerate((model.denoiser, quantized)):
            for name in units:
                handle = denoiser.get_submodule(name).register_forward_hook(keep(side, name))
                stack.callback(handle.remove)
        stack.callback(model.denoiser.register_forward_hook(compare, with_kwargs=True).remove)
        yield errors


def _parts(output: Any) -> list[Tensor]:
    """Returns all that a unit hands on: a block of SD 3 returns the text and the image, its last block no text."""
    return [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]


def _prediction(output: Any) -> Tensor:
    prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _bias(error: Tensor) -> float:
    """Returns the share of the energy of an error `[rows, channels, ...]` that is the mean of each channel."""
    means = error.transpose(0, 1).flatten(1).double().mean(dim=1)
    return float(means.square().mean() / error.double().square().mean())
