r"""Measures the error of single predictions on held-out trajectories, and how errors grow over the steps.

$$ e_t = \frac{\lVert \epsilon_q(x_t) - \epsilon(x_t) \rVert_2}{\lVert \epsilon(x_t) \rVert_2}, \qquad
g_t = \frac{\lVert x_t^q - x_t \rVert_2}{\lVert x_t \rVert_2} $$

The one-step error $e_t$ compares both denoisers on the inputs $x_t$ of the full-precision trajectory, so that errors of
earlier steps do not contribute. Calibration has not seen the noise of these trajectories; it may have seen their
prompts. The growth $g_t$ compares the trajectories of the two pipelines from the same noise.
The final distance is a noisy measure of a recipe, because errors of successive steps add coherently; the one-step error
is not. With guidance the error is also that of the guided prediction, $\epsilon_u + s (\epsilon_c - \epsilon_u)$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts import OneStepError
from edadm_cli.evaluate.request import SamplingPlan
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.calls import record_calls
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.families import family_of
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import sample

NUM_IMAGES = 16
"""Number of trajectories that the error is measured on: the first images of an evaluation."""


@dataclass
class _Trajectory:
    """The calls and predictions of the denoisers while some images are sampled, in their order.

    Attributes:
        calls: Which denoiser was called, with which arguments, and what it predicted.
        samples: The noisy sample of each call.
    """

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


def one_step_error(
    plan: SamplingPlan, load_full_precision: Callable[[], LoadedModel], load_quantized: Callable[[], LoadedModel]
) -> OneStepError:
    """Measures the one-step error and its growth; only one of the two pipelines is in memory at a time.

    Args:
        plan: The images of an evaluation, the first of which are sampled here.
        load_full_precision: Loads the full-precision pipeline.
        load_quantized: Loads the quantized pipeline.

    Raises:
        InputError: The pipeline calls its denoiser in a way that cannot be recorded.
    """
    count = min(NUM_IMAGES, plan.batch_size)
    model = load_full_precision()
    exact = _Trajectory()
    with ExitStack() as recordings:
        for place, each in model.by_denoiser().items():
            recordings.enter_context(_recording_predictions(place, each.denoiser, exact))
        _sample(model, plan, count, exact)
    guidance = plan.guidance_scale
    is_swapped = type(model.pipeline).__name__ in family_of(model.denoiser).conditional_first
    del model

    model = load_quantized()
    errors, guided = [], []
    with torch.no_grad():
        denoisers = {place: each.denoiser for place, each in model.by_denoiser().items()}
        for place, args, kwargs, prediction in exact.calls:
            other = prediction_of(denoisers[place](*args, **kwargs))
            errors.append(_squares(other, prediction))
            if guidance is not None and len(prediction) == 2 * count:
                both = (_guided(tensor, guidance, is_swapped) for tensor in (other, prediction))
                guided.append(_squares(*both))
    quantized = _Trajectory()
    _sample(model, plan, count, quantized)
    growth = [_relative(*_squares(*pair)) for pair in zip(quantized.samples, exact.samples, strict=True)]
    return OneStepError(
        num_images=count,
        rel_l2=_overall(errors),
        guided_rel_l2=_overall(guided) if guided else None,
        by_step=tuple(_relative(*pair) for pair in errors),
        guided_by_step=tuple(_relative(*pair) for pair in guided),
        growth=tuple(growth),
    )


def _sample(model: LoadedModel, plan: SamplingPlan, count: int, trajectory: _Trajectory) -> None:
    with ExitStack() as recordings:
        for each in model.by_denoiser().values():
            keep = record_calls(each.denoiser, lambda call: trajectory.samples.append(call.sample.float().cpu()))
            recordings.enter_context(keep)
        sample(
            model,
            seeds=plan.seeds[:count],
            prompts=None if plan.prompts is None else plan.prompts[:count],
            num_steps=plan.num_steps,
            guidance_scale=plan.guidance_scale,
        )


@contextmanager
def _recording_predictions(place: str, denoiser: nn.Module, trajectory: _Trajectory) -> Iterator[None]:
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        prediction = prediction_of(output).detach().clone()
        trajectory.calls.append((place, _copied(args, copies), _copied(kwargs, copies), prediction))

    with Hooks() as hooks:
        hooks.after(denoiser, keep, with_kwargs=True)
        yield


def _copied(value: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Returns a call with copied tensors, since schedulers may change them; shared tensors are copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = (value, value.detach().clone())
        original, copy = copies[id(value)]
        return copy if torch.equal(original, copy) else value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item, copies) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item, copies) for item in value)
    return value


def _guided(prediction: Tensor, scale: float, is_swapped: bool) -> Tensor:
    first, second = prediction.chunk(2)
    unconditional, conditional = (second, first) if is_swapped else (first, second)
    return unconditional + scale * (conditional - unconditional)


def _squares(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Returns the squared norms of the difference and of the second tensor."""
    second = second.double().cpu()
    return float((first.double().cpu() - second).square().sum()), float(second.square().sum())


def _relative(error: float, size: float) -> float:
    return (error / size) ** 0.5 if size > 0 else 0.0


def _overall(pairs: list[tuple[float, float]]) -> float:
    return _relative(sum(error for error, _ in pairs), sum(size for _, size in pairs))
