"""Builds the call that a pipeline would make of its denoiser, with random values, for families that describe one."""

from __future__ import annotations

from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.families import Call, ExampleValues, family_of


def example_call(denoiser: nn.Module, *, batch_size: int, seed: int = 0, size: tuple[int, int] | None = None) -> Call:
    """Returns the arguments of one denoiser call, on the denoiser's device and in its element type.

    Args:
        denoiser: A denoiser of diffusers.
        batch_size: Rows: images times guidance branches.
        seed: Seed of the values.
        size: Height and width of the latents, or of the pixels of a model without a decoder; else the model's own.
            A Flux model packs 2 x 2 latents into a token, and its own size is 128 x 128.

    Returns:
        `(args, kwargs)`.

    Raises:
        InputError: No family describes the call of this denoiser.
    """
    build = family_of(denoiser).example_call
    if build is None:
        raise InputError(
            f"The call of {type(denoiser).__name__} is not described, so it cannot be made from random values; a run "
            "holds recorded calls.",
            hint="edadm run --model MODEL --run DIR, then edadm bench --run DIR",
        )
    return build(denoiser, ExampleValues(denoiser, batch_size, seed, size))
