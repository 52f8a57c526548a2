"""The tiny text-to-image denoiser with a made-up calibration set: reconstruction without a collection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import nearest_params
from edadm_cli.calibrate.planning import plan_network
from edadm_cli.calibrate.ranges import search_ranges
from edadm_cli.config import BitWidth
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.units import Trace, Unit, trace, units
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.recipe import Recipe
from edadm_cli.reconstruct.batches import Batches
from edadm_cli.reconstruct.call_signatures import probe_units
from edadm_cli.reconstruct.capture import UnitCalls, capture_units
from edadm_cli.reconstruct.context import ReconstructionContext
from edadm_cli.reconstruct.hyperparameters import Hyperparameters, resolve
from edadm_cli.reconstruct.network import SwitchableNetwork
from edadm_cli.reconstruct.rows import RowCache, Rows

CPU = torch.device("cpu")
NUM_SAMPLES, BATCH = 5, 3  # the last batch is smaller
TEMPLATE: dict[str, Any] = {
    "args": [{"$sample": None}, {"$timestep": None}],
    "kwargs": {"encoder_hidden_states": {"$tensor": "text"}, "return_dict": False},
    "constants": [],
    "dtypes": {"text": "float32"},
}


@dataclass
class Setting:
    """A denoiser that is about to be reconstructed."""

    network: SwitchableNetwork
    traced: Trace
    plan: QuantizationPlan
    recipe: Recipe
    batches: Batches
    ranges: dict[str, Tensor]
    hyperparameters: Hyperparameters

    @property
    def denoiser(self) -> nn.Module:
        return self.network.denoiser

    def units(self, granularity: Any = "block") -> list[Unit]:
        return units(self.denoiser, self.traced, set(self.plan.layers), granularity)

    def context(self) -> ReconstructionContext:
        """All units learn."""
        every = self.units()
        return ReconstructionContext(self.network, self.traced, self.plan, every, every, self.batches)

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units() if unit.name == name)

    def restore(self) -> None:
        """Give the denoiser its own layers and processors back."""
        for name, module in self.network.float_layers.items():
            self.network.put_layer(name, module)
        for name, processor in self.network._float_processors.items():
            self.network.put_processor(name, processor)

    def cache(self, folder: Path, budget: int = 2**28) -> RowCache:
        return RowCache(folder, budget, CPU)

    def capture(self, actual: list[Unit], cache: RowCache, with_outputs: bool = True) -> list[UnitCalls]:
        """Calls of some units in the denoiser as it is now."""
        with self.network.full_precision():
            forms = probe_units(self.denoiser, actual, self.batches)
        return capture_units(self.denoiser, actual, forms, self.batches, cache, with_outputs=with_outputs)

    def nearest(self) -> dict[str, Tensor]:
        return nearest_params(self.network.float_weight, self.plan, self.ranges)


def all_rows(rows: Rows) -> Tensor:
    """The whole tensor."""
    return rows.read(range(rows.count))


def calibration_set() -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet(
        sample=torch.randn(NUM_SAMPLES, 4, 8, 8, generator=generator),
        timestep=torch.arange(NUM_SAMPLES) * 100 + 1,
        step_index=torch.arange(NUM_SAMPLES),
        trajectory_index=torch.arange(NUM_SAMPLES),
        condition={"text": torch.randn(NUM_SAMPLES, 8, 16, generator=generator)},
        unconditional={"text": torch.randn(NUM_SAMPLES, 8, 16, generator=generator)},
        constants={},
        template=TEMPLATE,
        branches=2,
        collected_in="float32",
    )


@pytest.fixture
def make_setting(denoiser: nn.Module) -> Callable[..., Setting]:
    """Plan and search: `make_setting(bits="w4a8", recipe=Recipe(...), **fields of the learn recipe)`."""

    def make(bits: str = "w4a8", recipe: Recipe | None = None, **learn: Any) -> Setting:
        recipe = recipe or Recipe(name="test")
        fields = {"iterations": 6, "batch_size": 5, **learn}
        parts = {
            "learn": recipe.learn.model_copy(update=fields),
            "ranges": recipe.ranges.model_copy(update={"num_candidates": 10}),
        }
        recipe = recipe.model_copy(update=parts)
        width = BitWidth.parse(bits)
        batches = Batches(calibration_set(), BATCH, CPU)
        (args, kwargs), *_ = iter(batches.few(1))
        traced = trace(denoiser, args, kwargs)
        plan = plan_network(traced, recipe, width)
        network = SwitchableNetwork(denoiser, list(plan.layers), list(plan.attentions))
        ranges = search_ranges(denoiser, traced, plan, recipe.ranges, batches, transforms=recipe.transforms)
        return Setting(network, traced, plan, recipe, batches, ranges, resolve(recipe.learn, None, width))

    return make


@pytest.fixture
def calibration() -> CalibrationSet:
    return calibration_set()
