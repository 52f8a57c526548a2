"""Takes random directions of the final sample back through all calls of a recorded sampler.

A change e_t of the prediction of call t changes the final sample by J_t e_t to first order. For a direction v of the
final sample, one sweep back through the sampler computes J_t^T v of all calls. Over directions of independent standard
normal numbers, the mean of <J_t^T v, e_t>^2 is |J_t e_t|^2, and that of |J_t^T v|^2 is the sum of the squares of J_t's
entries, by which a random change counts.

References:
    Hutchinson's estimator of the trace of J^T J (https://doi.org/10.1080/03610919008812866).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edadm_cli.errors import MachineError
from edadm_cli.models.collected import Sampling
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.failures import KINDS, is_out_of_memory
from edadm_cli.models.pipeline_calls.recorded_sampling import (
    NoGradientError,
    RecordedCall,
    RecordedSampling,
    record_sampling,
)
from edadm_cli.models.pipeline_calls.sampling import sample_with_gradients
from edadm_cli.models.sources.from_folder import first_sentence

NUM_DIRECTIONS = 4
"""K, the number of random directions per image."""
_SMALLEST_EFFECT = 1e-9  # so that a call without any has a logarithm

Through = Callable[[RecordedCall, Sequence[Tensor]], list[list[Tensor]]]
"""Takes the adjoints of a call's prediction, one per direction, back through its denoiser; returns for each of them the
gradients with respect to the `inputs` of the call."""


def freeze(model: LoadedModel) -> None:
    """Switches off the gradients of all parameters: with them, all activations of all steps would stay in memory."""
    for component in model.pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)


def record_images(model: LoadedModel, sampling: Sampling, images: slice) -> RecordedSampling:
    """Samples some of the images of a collection once more, with gradients.

    Args:
        model: The pipeline in full precision, after `freeze`.
        sampling: How the images of its collection were sampled.
        images: Which of these images, by their number.

    Raises:
        InputError: The final sample does not depend on the predictions in a way that has a gradient.
        MachineError: The device ran out of memory.
    """
    return record_sampling(
        {place: each.denoiser for place, each in model.by_denoiser().items()},
        lambda: sample_with_gradients(
            model,
            seeds=sampling.seeds[images],
            prompts=None if sampling.prompts is None else sampling.prompts[images],
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
        ),
    )


def random_directions(final: Tensor, seeds: Sequence[int], seed: int) -> Tensor:
    """Returns random directions `[K, N, *]` for final samples `[N, *]`.

    Args:
        final: The final samples.
        seeds: The seed of each image. Its directions do not depend on the other images.
        seed: The seed of the directions.
    """
    directions = []
    for image_seed in seeds:
        # `image_seed` itself seeds the image's noise
        generator = torch.Generator().manual_seed((~image_seed ^ seed) % 2**32)
        directions.append(torch.randn((NUM_DIRECTIONS, *final.shape[1:]), generator=generator))
    return torch.stack(directions, 1).to(final)


def sweep_back(
    recorded: RecordedSampling,
    directions: Tensor,
    through: Through,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Takes directions back through all calls, the last one first.

    Args:
        recorded: The run of the sampler.
        directions: K random directions, with shape `(K, N, *)`.
        through: What takes adjoints back through one call. It keeps what its caller wants to know of them.
        advance: Progress callback, called after every call.
    """
    count = len(directions)
    later: list[dict[int, list[Tensor]]] = [{} for _ in range(count)]  # of each direction
    for index in reversed(range(len(recorded.calls))):
        call = recorded.calls[index]
        adjoints = [recorded.adjoint(index, directions[k], later[k]) for k in range(count)]
        filled = [torch.zeros_like(call.prediction) if adjoint is None else adjoint for adjoint in adjoints]
        for of_direction, inputs in zip(later, through(call, filled), strict=True):
            of_direction[index] = inputs
        advance(1)


def gradients_through(
    denoiser: nn.Module, call: RecordedCall, adjoints: Sequence[Tensor], marks: Mapping[str, Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Takes adjoints of a call's prediction back through the denoiser.

    Args:
        denoiser: The denoiser.
        call: The call.
        adjoints: The adjoints, one per direction.
        marks: Tensors that enter the prediction besides the call's inputs; hooks may add them during the call.

    Returns:
        For each adjoint, the gradients with respect to the call's `inputs`, and those with respect to `marks`.
    """
    args, kwargs, leaves = call.with_leaves()
    with torch.enable_grad():
        prediction = prediction_of(denoiser(*args, **kwargs))
    variables = [*leaves, *marks.values()]
    inputs: list[list[Tensor]] = []
    of_marks: list[list[Tensor]] = []
    for number, adjoint in enumerate(adjoints):
        gradients: Sequence[Tensor] = ()
        if variables:
            is_last = number + 1 == len(adjoints)
            gradients = torch.autograd.grad(
                prediction, variables, adjoint, retain_graph=not is_last, allow_unused=True, materialize_grads=True
            )
        inputs.append(list(gradients[: len(leaves)]))
        of_marks.append(list(gradients[len(leaves) :]))
    return inputs, of_marks


@contextmanager
def explained_gradients(model: LoadedModel) -> Iterator[None]:
    """Turns the errors of a model that samples, but cannot be differentiated, into one sentence.

    Raises:
        NoGradientError: There was such an error.
        MachineError: The device ran out of memory.
    """
    try:
        yield
    except (*KINDS, MemoryError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise MachineError(
                f"{model.ref.id}: the device ran out of memory while final samples were followed back.",
                hint="a smaller --batch-size",
            ) from error
        raise NoGradientError(
            f"{model.ref.id} has no gradient of its final samples: {first_sentence(error)}"
        ) from error


def error_effects(
    model: LoadedModel,
    sampling: Sampling,
    place: str,
    quantized: nn.Module,
    count: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    r"""Returns how far the error of each call of a quantized denoiser moves the final sample, `(calls,)` float64.

    The error e of a call, with the inputs that the sampler has in full precision, changes the final sample by J e to
    first order. For a direction v of independent standard normal numbers, the mean of <J^T v, e>^2 is |J e|^2. The
    effect of a call is its root, and the geometric mean over the images: a few of them are far more sensitive than
    the others, and would decide an arithmetic mean alone.

    Args:
        model: The pipeline in full precision.
        sampling: How the images of its collection were sampled.
        place: Which denoiser is quantized.
        quantized: The quantized denoiser.
        count: How many of the images are sampled again.
        seed: The seed of the random directions.
        advance: Progress callback, called after every call of a denoiser in the sweep.

    Raises:
        NoGradientError: The final sample has no gradient, or it is not finite.
        MachineError: The device ran out of memory.
    """
    images, denoisers = slice(0, count), model.by_denoiser()
    effects: list[Tensor] = []
    freeze(model)

    def through(call: RecordedCall, adjoints: Sequence[Tensor]) -> list[list[Tensor]]:
        if call.place == place:
            args, kwargs, _ = call.with_leaves()
            with torch.no_grad():
                error = prediction_of(quantized(*args, **kwargs)) - call.prediction
                moved = torch.stack([sum_of_branches(adjoint * error, count).double().sum(1) for adjoint in adjoints])
            effects.insert(0, moved.square().mean(0).sqrt())
        return gradients_through(denoisers[call.place].denoiser, call, adjoints, {})[0]

    with explained_gradients(model):
        recorded = record_images(model, sampling, images)
        directions = random_directions(recorded.final, sampling.seeds[images], seed)
        sweep_back(recorded, directions, through, advance)
    of_images = torch.stack(effects)
    if not bool(of_images.isfinite().all()):
        raise NoGradientError(f"{model.ref.id}: the gradient of the final sample is not finite.")
    return of_images.clamp_min(_SMALLEST_EFFECT).log().mean(1).exp()


def sum_of_branches(values: Tensor, images: int) -> Tensor:
    """Returns the sum over the branches of guidance, `[N, D]`, of values of all rows of a call, `[branches * N, *]`."""
    return values.reshape(-1, images, values[0].numel()).sum(0)
