r"""Measures how much each candidate of each layer changes the final sample, to first order, in one backward sweep.

A candidate that changes the output of layer l at step t by d_{l,t} changes the final sample by

    dx_0 = sum_t J_{l,t} d_{l,t}

J_{l,t} is the derivative through the rest of the network, the rest of the sampler and all later calls. For a random
direction v of independent normal numbers, <v, dx_0> has the mean square |dx_0|^2, and

    <v, dx_0> = sum_t <J_{l,t}^T v, d_{l,t}>,

where J_{l,t}^T v is what a backward pass computes for all layers at once. So a sweep from the last step to the first
costs one forward of the network per step, the products of the candidates with the layers' inputs, and one backward pass
per direction, however many layers there are. Errors of different steps add up as they do in the sampler, with their
signs. The changes of different layers are assumed to be small enough that this first order is enough.

References:
    The mean square over random directions is Hutchinson's estimator of the trace of J^T J
    (https://doi.org/10.1080/03610919008812866).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.hooks import Hooks
from edadm_cli.models.pipeline_calls.backward_sweep import gradients_through, sum_of_branches, sweep_back
from edadm_cli.models.pipeline_calls.recorded_sampling import RecordedCall, RecordedSampling
from edadm_cli.sensitivity.candidates import LayerCandidates

Candidates = Mapping[str, Mapping[str, LayerCandidates]]
"""The candidates of the layers of each denoiser: by its place, then by the layer's name."""


@dataclass(frozen=True)
class Effects:
    """The effects on the final sample in several random directions.

    Attributes:
        layers: By the place of the denoiser and the layer's name, <v, dx_0> of each direction, candidate and image,
            with shape `(K, count, N)`, float64.
        gains: The gains of the steps by the denoiser's place, with shape `(T, N)`, float64. A gain is the squared
            change of the final sample per squared change of the predictions of a step, both as means over their
            elements. The change of the predictions is random, and the same in all branches of guidance. Gains are means
            over the directions.
    """

    layers: dict[str, dict[str, Tensor]]
    gains: dict[str, Tensor]


def measure_effects(
    recorded: RecordedSampling,
    denoisers: Mapping[str, nn.Module],
    candidates: Candidates,
    directions: Tensor,
    num_steps: Mapping[str, int],
) -> Effects:
    """Measures the effects of all candidates with one sweep over the calls of a recorded run, the last one first.

    Args:
        recorded: The run of the sampler.
        denoisers: The denoisers by place, at full precision.
        candidates: The candidates.
        directions: K random directions, with shape `(K, N, *)`.
        num_steps: The steps at which each denoiser is called; each call is a step of its own where they differ in their
            number of calls.
    """
    count, images = directions.shape[:2]
    sums = directions.new_zeros(count, 1, images, dtype=torch.float64)
    layers = {
        place: {name: sums.repeat(1, layer.count, 1) for name, layer in named.items()}
        for place, named in candidates.items()
    }
    gradients: dict[str, list[Tensor]] = {place: [] for place in num_steps}  # of a change that all branches share

    def through(call: RecordedCall, adjoints: Sequence[Tensor]) -> list[list[Tensor]]:
        inputs, changes = _through_call(denoisers[call.place], call, candidates[call.place], adjoints, images)
        for name, change in changes.items():
            layers[call.place][name] += change
        gradients[call.place].insert(0, torch.stack([sum_of_branches(adjoint, images) for adjoint in adjoints]))
        return inputs

    sweep_back(recorded, directions, through)
    squares = directions.double().flatten(2).square().sum(2).mean(0)
    gains = {place: _squares_of_steps(each, num_steps[place]) / squares for place, each in gradients.items()}
    return Effects(layers, gains)


def _squares_of_steps(of_calls: Sequence[Tensor], num_steps: int) -> Tensor:
    """Returns the squares of the gradients `[K, N, D]` of each step, summed over D and its calls, as `[T, N]`."""
    per_step, rest = divmod(len(of_calls), num_steps)
    per_step = 1 if rest else max(1, per_step)
    steps = [torch.stack(list(of_calls[i : i + per_step])).sum(0) for i in range(0, len(of_calls), per_step)]
    return torch.stack([step.double().square().sum(2).mean(0) for step in steps])


def _through_call(
    denoiser: nn.Module,
    call: RecordedCall,
    candidates: Mapping[str, LayerCandidates],
    adjoints: Sequence[Tensor],
    images: int,
) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """Takes the adjoints of a call's prediction back through the denoiser.

    Returns:
        The gradients with respect to the call's `inputs`, for each adjoint; and by layer the inner products
        `[K, count, N]` of its candidates' changes with the gradient of its output, summed over the rows of an image.
    """
    strengths: dict[str, Tensor] = {}
    with Hooks() as hooks:
        for name, layer in candidates.items():
            hooks.after(layer.layer, _marking(name, layer, strengths))
        inputs, gradients = gradients_through(denoiser, call, adjoints, strengths)
    rows = len(call.prediction)
    products = [[_by_image(gradient, rows, images) for gradient in each] for each in gradients]
    by_layer = zip(strengths, zip(*products, strict=True), strict=True)
    return inputs, {name: torch.stack(each) for name, each in by_layer}


def _marking(name: str, layer: LayerCandidates, strengths: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Returns a hook after which the gradient of `strengths[name]` holds the inner products of a layer's changes."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        changes = layer.output_changes(inputs[0])
        strengths[name] = output.new_zeros(changes.shape[:2], requires_grad=True)
        marked: Tensor = _Marked.apply(output, strengths[name], changes)
        return marked

    return hook


class _Marked(torch.autograd.Function):
    """Adds changes `[n, count, M]` with strengths `[n, count]` of zero to an output of n rows: it stays as it is."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, strengths: Tensor, changes: Tensor) -> Tensor:
        ctx.save_for_backward(changes)
        return output.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (changes,) = ctx.saved_tensors
        products = torch.bmm(changes, gradient.flatten(1).unsqueeze(2)).squeeze(2)
        return gradient, products, None


def _by_image(products: Tensor, rows: int, images: int) -> Tensor:
    """Returns inner products `[n, count]` as `[count, images]`.

    The rows of a call are those of all images, once per branch of guidance; a layer may have several rows for each of
    them. Where a layer has other rows, which images share, each image gets an equal part, so that the sum of squares
    over the images has the same mean.
    """
    if len(products) % rows:
        return (products.sum(0) / images**0.5).unsqueeze(1).expand(-1, images)
    return products.view(rows // images, images, -1, products.shape[1]).sum((0, 2)).T
