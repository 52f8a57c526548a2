"""The objects that a reconstruction works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edadm_cli.models.stored import num_weights
from edadm_cli.models.units import Trace, Unit
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.network import SwitchableNetwork


@dataclass(frozen=True)
class ReconstructionContext:
    """The objects that a reconstruction works on, on its device.

    Attributes:
        network: The denoiser.
        traced: Its trace.
        plan: The bits of every layer.
        units: All units, in execution order.
        learning: The units that learn.
        batches: The calibration set.
    """

    network: SwitchableNetwork
    traced: Trace
    plan: QuantizationPlan
    units: Sequence[Unit]
    learning: Sequence[Unit]
    batches: Batches

    def num_weights(self, unit: Unit) -> int:
        """Returns the number of weights in a unit's planned layers."""
        return sum(num_weights(self.network.float_layers[name]) for name in unit.layers)
