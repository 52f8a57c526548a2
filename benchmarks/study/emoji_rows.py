"""The rows of `benchmarks/emoji.py`: variants of recipes, bit widths and seeds, those that matter most first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from learner import variant_recipe

from study.learner_variants import BEFORE

TIME_PROJECTIONS = '{"pattern":"*norm1*.linear","weight_bits":8}'  # of emoji-dit
VARIANTS = {
    "default": "default",
    "default, float inputs": "default+ranges.float_input_share=0.05",
    "before": BEFORE,
    "paper, 300 iterations": "paper+learn.iterations=300",
    "q-diffusion, 300 iterations": "q-diffusion+learn.iterations=300+learn.weight_learning_rate=0.1"
    "+learn.activation_learning_rate=0.001",
    "network-wise": "network-wise",
    "network-wise, steps alike": "network-wise+learn.network_step_weights=alike",
    "network-wise, 256 trajectories, steps alike": "network-wise+learn.network_step_weights=alike"
    "+learn.network_samples=4096+select.num_samples=1024+select.samples_per_trajectory=4",
    "thorough": "thorough",
    "thorough, 300 iterations": "thorough+learn.iterations=300",
    "thorough, 300 iterations, all inputs quantized": "thorough+learn.iterations=300+ranges.float_input_share=0",
    "thorough, 300 iterations, gamma 0.2": "thorough+learn.iterations=300+learn.layer_loss_weight=0.2",
    "thorough, 300 iterations, N 4,096": "thorough+learn.iterations=300+select.samples_per_trajectory=16",
    "thorough, gamma 0.2": "thorough+learn.layer_loss_weight=0.2",
    "thorough, 300 iterations, gamma 0.2, time projections at 8 bits": "thorough+learn.iterations=300"
    f"+learn.layer_loss_weight=0.2+layers=[{TIME_PROJECTIONS}]",
    "paper": "paper",
    "ptq4dm": "ptq4dm",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
    "uniform": "default+select.strategy=uniform",
    "default, gamma 0": "default+learn.layer_loss_weight=0",
    "uniform, gamma 0": "default+select.strategy=uniform+learn.layer_loss_weight=0",
    "TDAC, median radius": "default+select.density_quantile=0.5",
    "default, gamma 1": "default+learn.layer_loss_weight=1",
    "default, time projections at 8 bits": f"default+layers=[{TIME_PROJECTIONS}]",
    "hadamard-64": 'default+transforms=[{"name":"hadamard-64"}]',
    "gamma 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
}
TRAJECTORIES = {"network-wise": 1024, "network-wise, steps alike": 1024}
"""By label, trajectories per collection, where they are not the model's number."""
MODELS, SMALL_MODEL = ("emoji-sd", "emoji-dit"), "ddpm-emoji"
FULL_PRECISION = "full precision"  # the label of rows without bits
PUBLISHED_ITERATIONS = 1000  # what "model" stands for
Line = tuple[Any, ...]
KEYS = ("model", "bits", "label", "seed")  # no two rows have the same values of all of these


@dataclass(frozen=True)
class Row:
    """One variant on one model at one bit width with one seed."""

    model: str
    seed: int
    label: str
    bits: str

    @property
    def variant(self) -> str:
        """The recipe and its changed fields."""
        return VARIANTS[self.label]

    @property
    def key(self) -> tuple[object, ...]:
        """The values of `KEYS`."""
        return tuple(getattr(self, key) for key in KEYS)

    @property
    def iterations(self) -> int:
        """Optimizer steps per unit, which take most of a row's time."""
        if not self.bits:
            return 0
        learn = variant_recipe(self.variant, None)[0].learn
        if learn.granularity == "none":
            return 0
        return PUBLISHED_ITERATIONS if learn.iterations is None else learn.iterations

    @property
    def length(self) -> float:
        """About how long it takes beside a row with 300 iterations on the same model."""
        together = variant_recipe(self.variant, None)[0].learn.network_iterations if self.bits else 0
        return (self.iterations / 300 or 0.4) + together / 1000

    @property
    def name(self) -> str:
        """Name of the row in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.model} {self.label} {self.bits} {self.seed}".lower())


def rows_in_order(models: list[str], seeds: list[int]) -> list[Row]:
    """Returns all rows, those that matter most first.

    A wave has lines of labels, bit widths and seeds. Its rows of `emoji-sd` come first, because they take longest.
    """
    rows: dict[Row, None] = {}
    for wave in (*_waves(seeds), *_small_waves(seeds)):
        for model in sorted(models, reverse=True):
            for labels, widths, few, *only in wave:
                if model in (only or MODELS):
                    rows |= {Row(model, seed, label, bits): None for bits in widths for seed in few for label in labels}
    return list(rows)


def _waves(seeds: list[int]) -> list[list[Line]]:
    """Returns the lines of each wave: labels, bit widths, seeds, and the models where it is not for all of them."""
    one = seeds[:1]
    default, paper, float_inputs = ("default",), ("paper, 300 iterations",), ("default, float inputs",)
    ships = (*default, *float_inputs, *paper, "thorough, 300 iterations")
    published = ("q-diffusion, 300 iterations", "before")
    unlearned = ("ptq4dm", "ranges-only", "rtn")
    best = (*float_inputs, "thorough, 300 iterations, gamma 0.2")
    time = ("thorough, 300 iterations, gamma 0.2, time projections at 8 bits",)
    rest = ("gamma 0.8, absolute", "TDAC, median radius")
    long = ("thorough, 300 iterations, all inputs quantized", "thorough")
    widths, budgets = ("w8a8", "w3a8", "w4a4", "w6a6"), ("auto:4.5a8", "auto:4.25g32a8", "auto:3.5a8", "auto:4.1a8")
    return [
        [
            ((FULL_PRECISION,), ("",), seeds),
            (ships[:3], ("w4a8",), seeds),
            (default, ("w8a8", "w4g32a8"), seeds),
            (default, widths, one),
        ],
        [
            (("network-wise",), ("w4a8",), seeds),
            (("network-wise, steps alike", "network-wise, 256 trajectories, steps alike"), ("w4a8",), one),
            (("network-wise",), ("w3a8", "w4g32a8"), one),
        ],
        [
            (best, ("w4g32a8",), one),
            (time, ("w4g32a8", "w4a8"), one, "emoji-dit"),
            (("uniform", "default, gamma 0", "uniform, gamma 0"), ("w4a8",), seeds),
            (published, ("w4a8",), one),
        ],
        [
            (("paper", "thorough, gamma 0.2"), ("w4a8",), one, "emoji-dit"),
            (published, ("w4a8",), seeds),
            (float_inputs, ("w8a8",), one, "emoji-sd"),
            (unlearned, ("w4a8",), seeds),
            (unlearned, widths, one),
        ],
        [(default, ("w3a8", "w3g16a8"), seeds), (best, ("w4g32a8",), seeds), (paper, widths, one)],
        [(default, ("w4a4", "w6a6", "w3g32a8"), seeds), (("hadamard-64",), ("w4a4",), one), (rest, ("w4a8",), seeds)],
        [(default, budgets, one)],
        [(paper, ("w8a8", "w3a8"), seeds), (default, budgets, seeds), ((*ships, *long), ("w4a8",), seeds)],
        [((*ships, *published, *unlearned, *rest, *long), widths, seeds)],
    ]


def _small_waves(seeds: list[int]) -> list[list[Line]]:
    """Returns the waves of `ddpm-emoji`. The first one has one seed and ends with the row that takes longest."""
    published, learned = ("q-diffusion, 300 iterations",), ("default", "paper, 300 iterations")
    halves, unlearned = ("uniform", "default, gamma 0"), ("ptq4dm", "ranges-only", "rtn")
    widths, one, exact = ("w8a8", "w3a8", "w4a4", "w6a6"), seeds[:1], ((FULL_PRECISION,), ("",), seeds)
    waves: list[list[tuple[tuple[str, ...], tuple[str, ...], list[int]]]] = [
        [
            (learned, ("w4a8",), one),
            (("default",), widths, one),
            ((*halves, *unlearned, *published), ("w4a8",), one),
        ],
        [exact, ((*learned, *halves), ("w4a8",), seeds), (("default",), ("w8a8",), seeds)],
        [((*published, *unlearned, "uniform, gamma 0"), ("w4a8",), seeds), (("default",), widths, seeds)],
    ]
    return [[(*line, SMALL_MODEL) for line in wave] for wave in waves]
