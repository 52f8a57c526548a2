"""Records how a sampler computes its final sample from the predictions of the denoiser.

The sampler runs once at full precision. Each prediction is cut out of the network's graph and becomes a leaf of the
scheduler's: what remains is how every input of a later call and the final sample depend on the predictions. This graph
holds the scheduler's few operations per step, guidance, and masks, whatever the pipeline does between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.predictions import prediction_of


class NoGradientError(InputError):
    """The final samples of a pipeline cannot be followed back to the predictions of its denoisers."""


@dataclass(frozen=True)
class RecordedCall:
    """One call of a denoiser.

    Attributes:
        place: Which denoiser was called; see `CollectedRun.places`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        prediction: The prediction, a leaf of the scheduler's graph, with shape `(rows, *)`.
    """

    place: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """The arguments that depend on earlier predictions; empty in the first call."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def with_leaves(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """Returns the arguments without their history, and those of `inputs` among them, as leaves of a new graph."""
        leaves: list[Tensor] = []

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = pytree.tree_map(cut, (self.args, self.kwargs))
        return args, kwargs, leaves


@dataclass(frozen=True)
class RecordedSampling:
    """One run of a sampler.

    Attributes:
        calls: The calls of all denoisers in order.
        final: The final sample with its graph, whose leaves are the predictions, with shape `(N, *)`.
    """

    calls: list[RecordedCall]
    final: Tensor

    def adjoint(self, index: int, direction: Tensor, later: Mapping[int, list[Tensor]]) -> Tensor | None:
        r"""Returns the gradient of <direction, final sample> with respect to a prediction; `None` if it has none.

        Args:
            index: The number of the call.
            direction: A tensor in the shape of the final sample.
            later: The gradients with respect to the `inputs` of each later call, by the number of the call.
        """
        outputs, gradients = [self.final], [direction]
        for number, of_inputs in later.items():
            outputs += self.calls[number].inputs
            gradients += of_inputs
        leaf = self.calls[index].prediction
        return torch.autograd.grad(outputs, leaf, gradients, retain_graph=True, allow_unused=True)[0]


def record_sampling(denoisers: Mapping[str, nn.Module], generate: Callable[[], Tensor]) -> RecordedSampling:
    """Runs a sampler once and records it.

    Args:
        denoisers: The denoisers by place; see `CollectedRun.places`. Their parameters have `requires_grad` off.
        generate: Samples with gradients switched on, and returns the final sample.

    Raises:
        NoGradientError: The final sample does not depend on the predictions in a way that has a gradient.
    """
    calls: list[RecordedCall] = []

    def recorder(place: str) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            prediction = prediction_of(output).detach().requires_grad_()
            calls.append(RecordedCall(place, args, kwargs, prediction))
            return _with_prediction(output, prediction)

        return record

    with Hooks() as hooks:
        for place, denoiser in denoisers.items():
            hooks.after(denoiser, recorder(place), with_kwargs=True)
        final = generate()
    if not final.requires_grad:
        raise NoGradientError(
            "The final sample of this pipeline has no gradient with respect to the denoiser's predictions, so what"
            " changes it cannot be measured."
        )
    return RecordedSampling(calls, final)


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """Returns a denoiser's output with another prediction in its place."""
    if isinstance(output, Tensor):
        return prediction
    first = list(prediction.unbind()) if isinstance(output[0], list) else prediction
    if isinstance(output, tuple):
        return (first, *output[1:])
    output.sample = first
    return output
