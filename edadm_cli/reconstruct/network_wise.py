"""Learns all units of a denoiser once more, together, on the error of its prediction (network-wise reconstruction).

Block reconstruction minimises the error at the output of each block, although the errors of some blocks change the
prediction more than those of others, and although one block could make up for the errors of another one. Once every
unit has learned by itself, this stage treats the whole denoiser as one unit: its inputs are samples of all
sampler steps, its targets the predictions in full precision. Learning starts at the rounding and the scales that the
units have learned.

References:
    BRECQ, arXiv 2102.05426, section 3.2 (network-wise reconstruction); EfficientDM, arXiv 2310.03270 (distillation of
    the whole denoiser).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edadm_cli.errors import MachineError
from edadm_cli.models.gpu_memory import available_bytes
from edadm_cli.models.placement import memory_of
from edadm_cli.models.units import Unit
from edadm_cli.processes import ALONE, Processes
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import ChannelValue
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import UnitForm, probe_units
from edadm_cli.reconstruct.capture import UnitCalls, capture_units
from edadm_cli.reconstruct.held_back import RowSplit
from edadm_cli.reconstruct.hyperparameters import Hyperparameters
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.rows import RowCache, Rows, RowType, chunks
from edadm_cli.reconstruct.trainer import UnitLearner
from edadm_cli.reconstruct.unit_data import UnitData, UnitResult, channel_loss, on_device, row_losses, scaled_rows

_CHECKS = 20  # of the loss on what is held back, while learning goes on
_SMALLEST_ERROR = 1e-6  # of a step, as a share of the largest error of a step
_KEPT_PER_LAYER = 6  # tensors of the size of a layer's output: quantized inputs, norms, activation functions, attention
_MEMORY_SHARE = 0.5  # of the memory of a GPU that is free, or of all memory without one
_CHANNEL_VALUES: tuple[ChannelValue, ...] = ("weight-scale", "bias")


def whole_denoiser(network: SwitchableNetwork, units: Sequence[Unit]) -> Unit:
    """Returns the denoiser as one unit with the layers of `units`; its name is that of the root module, `""`."""
    layers = tuple(name for unit in units for name in unit.layers)
    attentions = tuple(name for unit in units for name in unit.attentions)
    return Unit("", "layer", network.denoiser, layers, attentions)


def hyperparameters_of(given: Hyperparameters) -> Hyperparameters:
    """Returns the numbers of the optimization of the whole denoiser.

    There are no losses of inner layers, and nothing is dropped. Scales of weights and biases are always learned: they
    cost nothing when the denoiser runs.
    """
    values = tuple(dict.fromkeys((*given.channel_values, *_CHANNEL_VALUES)))
    return given.model_copy(
        update={
            "iterations": given.network_iterations,
            "batch_size": given.network_batch_size,
            "weight_learning_rate": given.network_learning_rate,
            "layer_loss_weight": 0.0,
            "input_drop": 0.0,
            "activation_drop": 0.0,
            "rounding_first": 0.0,
            "rounding_regularizer": 0.0,
            "channel_values": values,
        }
    )


def activation_bytes(form: UnitForm) -> int:
    """Returns about how many bytes of activations a row of the whole denoiser keeps for its gradients.

    Args:
        form: The form of the denoiser's calls, with its layers.
    """
    return _KEPT_PER_LAYER * sum(kind.bytes for kind in (*form.inputs, *form.outputs, *form.layers.values()))


class WholeLearner(UnitLearner):
    """Learns the whole denoiser, and keeps what had the smallest loss on the rows that were held back.

    The rows of a step go through the denoiser in parts, so that their activations fit into memory.

    Args:
        rows_at_once: The rows of a part. In several parts, each part is computed twice, once more for its gradients.
        rows_evaluated: The rows of a forward without gradients.
        arguments: The arguments of `UnitLearner`.
    """

    def __init__(self, rows_at_once: int, rows_evaluated: int, *arguments: Any) -> None:
        self.rows_at_once, self._rows_evaluated = rows_at_once, rows_evaluated
        self._best: tuple[float, dict[str, Tensor]] | None = None
        super().__init__(*arguments)

    @property
    def rows_evaluated(self) -> int:
        """The rows of a forward without gradients."""
        return self._rows_evaluated

    def learn(self, advance: Callable[[int], None] = lambda _: None) -> UnitResult:
        """Runs the optimizer, and returns the parameters of the check with the smallest loss; see `UnitLearner`."""
        result = super().learn(advance)
        losses = result.losses
        if self._best is None or self._best[0] >= min(losses.loss_before, losses.loss_after):
            return result
        loss, params = self._best
        return UnitResult(
            params, losses.model_copy(update={"loss_after": loss, "loss_soft": loss, "is_nearest": False})
        )

    def after_iteration(self, iteration: int) -> None:
        """Compares the loss now and then, if rows are held back."""
        every = max(1, self.hyperparameters.iterations // _CHECKS)
        if not self.split.holds_back or (iteration + 1) % every:
            return
        loss = self.reconstruction_loss()
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = loss, self.learned.params()

    def loss(self) -> Tensor:
        """Returns this process's share of the loss of the chosen rows."""
        self.learned.materialize()
        parts = chunks(self.share.size, self.rows_at_once)
        if len(parts) == 1:
            losses = [self._loss_of(parts[0])]
        else:
            losses = [checkpoint(self._loss_of, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(losses).sum() / self.share.total

    def _loss_of(self, part: range) -> Tensor:
        """Returns the sum of the losses of some rows of the step."""
        inputs, targets, factors = (
            [_rows(tensor, part, self.share.size) for tensor in self.groups[name]]
            for name in ("inputs", "outputs", "factors")
        )
        args, kwargs = self.data.full_precision.call(inputs)
        outputs = self.data.full_precision.outputs_of(self.module(*args, **kwargs))
        pairs = zip(scaled_rows(outputs, *factors), scaled_rows(targets, *factors), strict=True)
        return len(part) * torch.stack([channel_loss(*pair) for pair in pairs]).sum()


def _rows(tensor: Tensor, part: range, size: int) -> Tensor:
    """Returns the entries of some of the `size` rows of a tensor `[size * entries, ...]`."""
    entries = len(tensor) // size
    return tensor[part.start * entries : part.stop * entries]


class WholeReconstruction:
    """Learns the rounding and the scales of all units together.

    Args:
        network: The denoiser, all of whose units are quantized.
        plan: The bits of every layer.
        ranges: The ranges that were searched, to which the rounding of the units belongs.
        batches: The samples to learn from.
        hyperparameters: The numbers of the optimization of units; see `hyperparameters_of`.
        step_effects: How far the errors of each sampler step, as the units have learned, move the final sample, `(T,)`;
            without them all steps count alike.
    """

    def __init__(
        self,
        network: SwitchableNetwork,
        plan: QuantizationPlan,
        ranges: Mapping[str, Tensor],
        batches: Batches,
        hyperparameters: Hyperparameters,
        step_effects: Tensor | None = None,
    ) -> None:
        self.step_effects = step_effects
        self.network, self.plan, self.ranges, self.batches = network, plan, ranges, batches
        self.hyperparameters = hyperparameters_of(hyperparameters)

    def learn(
        self,
        whole: Unit,
        learned: Mapping[str, Tensor],
        seed: int,
        cache: RowCache,
        advance: Callable[[int], None],
        processes: Processes = ALONE,
    ) -> UnitResult:
        """Returns the parameters of all layers of `whole`, and the losses of the prediction.

        Some trajectories are held back (`RowSplit`), and the losses are theirs. The parameters are those with the
        smallest one: after some of the iterations, or what the units had learned if nothing made the prediction better.

        Args:
            whole: The result of `whole_denoiser`.
            learned: The parameters that the units have learned by themselves.
            seed: The seed of the order of samples.
            cache: Stores the rows of inputs and targets.
            advance: Progress callback, called after every iteration.
            processes: The processes that learn together.

        Raises:
            MachineError: The memory of the device does not suffice for a step.
            InputError: The loss is not finite.
        """
        calls = self._capture(whole, cache, processes)
        factors = self._row_factors(calls, cache, processes)
        data, split = UnitData(calls, calls, {}, factors), RowSplit.of(self.batches.trajectory_of_rows())
        rows_at_once = min(self.hyperparameters.batch_size, self._rows_that_fit(calls.form))
        while True:
            arguments = (self.network, whole, self.plan, self.ranges, data, self.hyperparameters, seed, processes)
            try:
                learner = WholeLearner(rows_at_once, self.batches.batch_size, *arguments, learned, split)
                result = learner.learn(advance)
                break
            except torch.OutOfMemoryError as error:
                if rows_at_once == 1:
                    raise MachineError(
                        f"The memory of {self.network.device} does not suffice to learn all units together.",
                        hint="network_iterations = 0 in [learn] of the recipe",
                    ) from error
            rows_at_once = -(-rows_at_once // 2)
        cache.release([*calls.tensors, *calls.outputs, factors])
        return result

    def _capture(self, whole: Unit, cache: RowCache, processes: Processes) -> UnitCalls:
        """Returns the calls of the denoiser in full precision, over all samples."""
        denoiser, batches = self.network.denoiser, self.batches
        with self.network.full_precision():
            forms = probe_units(denoiser, [whole], batches)
            (calls,) = capture_units(denoiser, [whole], forms, batches, cache, with_outputs=True, processes=processes)
        if cache.shared:
            calls.tensors = [cache.settle(rows, batches.batch_size) for rows in calls.tensors]
            calls.outputs = [cache.settle(rows, batches.batch_size) for rows in calls.outputs]
            processes.wait()
        return calls

    def _rows_that_fit(self, form: UnitForm) -> int:
        """Returns how many rows can go through the denoiser at once while their activations are kept for gradients."""
        device = self.network.device
        available = available_bytes(device) if device.type == "cuda" else memory_of(device)
        return max(1, int(_MEMORY_SHARE * available / activation_bytes(form)))

    @torch.no_grad()
    def _row_factors(self, calls: UnitCalls, cache: RowCache, processes: Processes) -> Rows:
        """Returns the square root of each row's weight; see `step_weights`."""
        losses = torch.zeros(calls.rows, dtype=torch.float64, device=self.network.device)
        parts = chunks(calls.rows, self.batches.batch_size)
        for places in parts[processes.index :: processes.count]:
            args, kwargs = calls.call(on_device(calls.tensors, places, self.network.device))
            outputs = calls.outputs_of(self.network.denoiser(*args, **kwargs))
            targets = on_device(calls.outputs, places, self.network.device)
            losses[places.start : places.stop] = row_losses(outputs, targets, len(places))
        processes.sum(losses)
        steps = torch.tensor(self.batches.step_of_rows(), device=losses.device)
        weights = step_weights(losses, steps, self.step_effects)
        factors = cache.allocate(calls.rows, RowType((), torch.float32))
        factors.write(range(calls.rows), weights[steps].sqrt().float())
        return cache.settle(factors, calls.rows) if cache.shared else factors


def step_weights(losses: Tensor, steps: Tensor, effects: Tensor | None) -> Tensor:
    r"""Returns the weight of the rows of each sampler step, `(T,)`, with which the mean over all rows begins at 1.

    Rows of step t, whose mean loss is E_t, get the weight 1 / E_t without effects: each step counts by how much of its
    error is left. Otherwise the steps with the largest errors, which are those of nearly clean samples, would decide
    alone, and they change the final sample least.

    With the effects c_t the weight is c_t / E_t. Errors of the steps move the final sample by at most the sum of these
    effects. While learning goes on, the loss of a step becomes e_t and its effect about c_t sqrt(e_t / E_t); by the
    inequality of Cauchy and Schwarz the square of their sum is at most the sum of c_t times the sum of c_t e_t / E_t.
    So each step counts by how much of its error is left, times c_t.

    Args:
        losses: The loss of each row before learning, `(rows,)`.
        steps: The sampler step of each row, `(rows,)`.
        effects: How far the errors of each step move the final sample, `(T,)`.
    """
    counts = steps.bincount()
    means = losses.new_zeros(len(counts)).index_add(0, steps, losses) / counts
    present = means.nan_to_num()
    smallest = max(_SMALLEST_ERROR * float(present.max()), torch.finfo(torch.float32).tiny)
    errors = means.clamp(min=smallest)
    weights = errors.reciprocal() if effects is None else effects.to(losses)[: len(errors)] / errors
    scale = (weights * present).nan_to_num() @ counts.to(losses) / len(losses)
    return weights / scale if scale > 0 else weights
