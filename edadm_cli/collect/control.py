"""Records the calls of a control network, and which inputs of the denoiser it computes.

A ControlNet takes the noisy sample, the timestep and an image, and returns residuals that the denoiser adds to its
hidden states. The residuals differ from step to step and are far larger than the sample. `collect` therefore stores the
conditions of the control network, which stay the same over a trajectory. `select` computes the residuals of the samples
that it chooses.

References:
    Adding Conditional Control to Text-to-Image Diffusion Models, arXiv 2302.05543.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from edadm_cli.collect.branches import difference
from edadm_cli.errors import InputError
from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, flat_tensors, split_call

CONTROL = "controlnet"


@dataclass
class ControlRecorder:
    """Records the calls of a control network.

    Args:
        model: The name of the model, which messages use.
        network: The control network.

    Attributes:
        first: The first call of the control network.
        names: The names of the tensors of the denoiser's call that the control network computes, in the order in which
            it returns them.
        shapes: The shape of one row of each of these tensors.
    """

    model: str
    network: nn.Module
    first: DenoiserCall | None = None
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    _outputs: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Returns a context that records the calls of the control network."""
        with Hooks() as hooks:
            hooks.after(self.network, self._on_call, with_kwargs=True)
            yield

    def without_computed(self, call: DenoiserCall) -> DenoiserCall:
        """Returns a call of the denoiser without the tensors that the control network computed for it.

        Raises:
            InputError: The pipeline changes a tensor that the control network returned before it calls the denoiser.
        """
        names = {tensor.data_ptr(): name for name, tensor in call.tensors.items()}
        given = [names.get(output.data_ptr()) for output in self._outputs]
        computed = [name for name in given if name is not None]
        if len(computed) < len(given) or (self.first is not None and len(self.first.sample) != len(call.sample)):
            raise InputError(
                f"{self.model} changes what its control network returns before it is an input of the denoiser, as the "
                "guess mode of ControlNet does, so that the denoiser's inputs cannot be computed again.",
                hint="call arguments without guess_mode",
            )
        if not self.names:
            self.names, self.shapes = tuple(computed), tuple(tuple(output.shape[1:]) for output in self._outputs)
        return replace(call, tensors={name: t for name, t in call.tensors.items() if name not in computed})

    def _on_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        call = split_call(self.network, args, kwargs)
        self._outputs = flat_tensors(outputs)
        if self.first is None:
            self.first = call.copied()
            return
        changed = difference(call, self.first)
        if changed is not None:
            raise InputError(
                f"{self.model}: {changed} of its control network changes between two steps; only conditions that stay "
                "the same over a trajectory can be calibrated."
            )
