"""What a reconstruction works on."""

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
    """Everything that a reconstruction works with, on its device.

    Attributes:
        network: The denoiser.
        traced: Its trace.
        plan: Bits of every layer.
        units: All units, in execution order.
        learning: Those that learn.
        batches: The calibration set.
    """

    network: SwitchableNetwork
    traced: Trace
    plan: QuantizationPlan
    units: Sequence[Unit]
    learning: Sequence[Unit]
    batches: Batches

    def num_weights(self, unit: Unit) -> int:
        """Returns the weights of a unit's planned layers."""
        return sum(num_weights(self.network.float_layers[name]) for name in unit.layers)
