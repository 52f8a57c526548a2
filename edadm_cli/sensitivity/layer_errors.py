r"""Measures the error of the prediction when one layer alone is quantized.

For a layer l at b bits, the denoiser runs over calibration samples in full precision and with that layer quantized
(searched ranges, nearest rounding, nothing learned). The error of the guided prediction, weighted by the gains of the
steps, predicts the rise of the final error that the layer causes alone:

    E_{l,b} = sum_t g_t mean over the samples of step t of |eps_{l,b} - eps|^2

`final_distance` measures that rise at one width.

References:
    The weighting follows the measured effect of each step on the final sample instead of a running mean of losses as
    in DMQ (arXiv 2507.12933); one layer at a time as in MixDQ (arXiv 2405.17873).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.models.families import Call
from edadm_cli.quant.network import load_quant_params, quantize_network, set_module
from edadm_cli.quant.plan import LayerPlan, QuantizationPlan
from edadm_cli.sensitivity.gains import StepGains


@dataclass(frozen=True)
class PredictionBatch:
    """A batch of calibration samples, with the prediction at full precision.

    Attributes:
        call: Arguments of the denoiser; with guidance the rows of the unconditional branch come first.
        step_index: The denoiser call of the sampler that each sample is from, with shape `(n,)`.
        prediction: The guided prediction at full precision, with shape `(n, *)`.
    """

    call: Call
    step_index: Tensor
    prediction: Tensor


class PredictionError:
    """The error of a changed denoiser's prediction, in units of the final sample's energy.

    Args:
        denoiser: The denoiser, at full precision when this object is created; it may be changed afterwards.
        calls: Arguments of the denoiser and the step index of each sample, batch by batch.
        gains: The effect of an error at each step on the final sample.
        branches: 2 with guidance, else 1.
        guidance_scale: Scale of guidance; not used if `branches` is 1.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        calls: Sequence[tuple[Call, Tensor]],
        gains: StepGains,
        branches: int,
        guidance_scale: float,
    ) -> None:
        self.denoiser, self.gains = denoiser, gains
        self.branches, self.guidance_scale = branches, guidance_scale
        self.batches = [PredictionBatch(call, index, self._predict(call)) for call, index in calls]

    @torch.no_grad()
    def measure(self) -> float:
        """Returns the predicted relative squared error of the final sample; steps without samples count as the mean."""
        num_steps = len(self.gains.gains)
        energy = torch.zeros(num_steps, dtype=torch.float64)
        samples = torch.zeros(num_steps, dtype=torch.float64)
        for batch in self.batches:
            error = (self._predict(batch.call) - batch.prediction).double()
            energy.index_add_(0, batch.step_index, error.flatten(1).square().mean(1).cpu())
            samples.index_add_(0, batch.step_index, torch.ones(len(error), dtype=torch.float64))
        seen = samples > 0
        per_step = self.gains.gains[seen] * energy[seen] / samples[seen]
        return float(per_step.mean() * num_steps / max(self.gains.final_energy, 1e-30))

    @torch.no_grad()
    def _predict(self, call: Call) -> Tensor:
        args, kwargs = call
        prediction = prediction_of(self.denoiser(*args, **kwargs)).float()
        if self.branches == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


@contextmanager
def one_layer_quantized(
    denoiser: nn.Module, name: str, plan: LayerPlan, ranges: Mapping[str, Tensor]
) -> Iterator[None]:
    """Quantizes one layer of a full-precision denoiser to nearest while entered.

    Args:
        denoiser: The denoiser, whose other layers are not changed.
        name: Dotted name of the layer.
        plan: The layer's bits.
        ranges: The parameters of the layer under the names of `search_ranges`.
    """
    layer = denoiser.get_submodule(name)
    alone = QuantizationPlan(layers={name: plan})
    prefixes = (f"{name}.weight_", f"{name}.input_", f"{name}.part")
    needed = {key: value for key, value in ranges.items() if key.startswith(prefixes)}
    params = nearest_params(lambda _: layer.get_parameter("weight"), alone, needed)
    quantize_network(denoiser, alone)
    try:
        load_quant_params(denoiser, params)
        yield
    finally:
        set_module(denoiser, name, layer)


def layer_errors(
    error: PredictionError,
    name: str,
    candidates: Mapping[int, tuple[LayerPlan, Mapping[str, Tensor]]],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, float]:
    """Returns the predicted rise of the final error of one layer at each of several widths.

    Args:
        error: Measures the error of the prediction.
        name: Dotted name of the layer.
        candidates: Maps a number of bits to the layer's plan and ranges.
        advance: Progress callback, called with 1 after each width.
    """
    errors = {}
    for bits, (plan, ranges) in candidates.items():
        with one_layer_quantized(error.denoiser, name, plan, ranges):
            errors[bits] = error.measure()
        advance(1)
    return errors
