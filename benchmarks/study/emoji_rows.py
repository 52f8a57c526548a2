"""The rows of `benchmarks/emoji.py`: variants of recipes, bit widths and seeds, those that matter most first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from learner import variant_recipe

from study.learner_variants import BEFORE

VARIANTS = {
    "default": "default",
    "default, float inputs": "default+ranges.float_input_share=0.05",
    "before": BEFORE,
    "paper, 300 iterations": "paper+learn.iterations=300",
    "q-diffusion, 300 iterations": "q-diffusion+learn.iterations=300+learn.weight_learning_rate=0.1"
    "+learn.activation_learning_rate=0.001",
    "thorough": "thorough",
    "thorough, 300 iterations": "thorough+learn.iterations=300",
    "thorough, 300 iterations, all inputs quantized": "thorough+learn.iterations=300+ranges.float_input_share=0",
    "thorough, 300 iterations, gamma 0.2": "thorough+learn.iterations=300+learn.layer_loss_weight=0.2",
    "thorough, 300 iterations, N 4,096": "thorough+learn.iterations=300+select.samples_per_trajectory=16",
    "ptq4dm": "ptq4dm",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
    "uniform": "default+select.strategy=uniform",
    "default, gamma 0": "default+learn.layer_loss_weight=0",
    "uniform, gamma 0": "default+select.strategy=uniform+learn.layer_loss_weight=0",
    "TDAC, median radius": "default+select.density_quantile=0.5",
    "default, gamma 1": "default+learn.layer_loss_weight=1",
    "hadamard-64": 'default+transforms=[{"name":"hadamard-64"}]',
    "gamma 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
}
MODELS = ("emoji-sd", "emoji-dit")
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
    def learns(self) -> bool:
        """Whether anything is learned, which takes most of a row's time."""
        learn = variant_recipe(self.variant, None)[0].learn
        return learn.granularity != "none" and learn.iterations != 0

    @property
    def name(self) -> str:
        """Name of the row in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.model} {self.label} {self.bits} {self.seed}".lower())


def rows_in_order(models: list[str], seeds: list[int]) -> list[Row]:
    """Returns all rows, those that matter most first."""
    default, paper = ("default",), ("paper, 300 iterations",)
    ships = (*default, "default, float inputs", *paper, "thorough, 300 iterations")
    published = ("q-diffusion, 300 iterations", "ptq4dm", "before")
    fields = ("uniform", "uniform, gamma 0", "default, gamma 0")
    rest = ("gamma 0.8, absolute", "TDAC, median radius", "ranges-only", "rtn")
    long = ("thorough, 300 iterations, all inputs quantized", "thorough")
    few_bits = ("w3a8", "w4g32a8", "w3g16a8", "auto:4.5a8", "w4a4", "w6a6", "auto:3.5a8")
    more_bits = ("w3g32a8", "auto:4.1a8", "auto:3.5g16a8")
    best = ("default, float inputs", "thorough, 300 iterations, gamma 0.2")
    plan: list[tuple[Sequence[str], Sequence[str], list[int]]] = [
        (ships[:3], ("w4a8",), seeds),
        (default, ("w8a8",), seeds),
        (default, few_bits, seeds[:1]),
        (default, ("w4g32a8",), seeds),
        (fields, ("w4a8",), seeds),
        (published, ("w4a8",), seeds[:1]),
        (best, ("w4g32a8",), seeds[:1]),
        (paper, ("w8a8", "w3a8", "w4a4", "w6a6"), seeds[:1]),
        (("hadamard-64",), ("w4a4",), seeds[:1]),
        (default, few_bits[:4], seeds),
        (best, ("w4g32a8",), seeds),
        (published, ("w4a8",), seeds),
        (default, (*more_bits, *few_bits[4:]), seeds),
        (paper, ("w8a8", "w3a8"), seeds),
        (rest, ("w4a8",), seeds),
        (("ptq4dm", "ranges-only", "rtn"), ("w8a8", "w3a8", "w4a4", "w6a6"), seeds[:1]),
        ((*ships, *long), ("w4a8",), seeds),
        ((*ships, *published, *rest, *long), ("w8a8", "w3a8", "w4a4", "w6a6"), seeds),
    ]
    rows: dict[Row, None] = {}
    for labels, widths, few in plan:
        for bits in widths:
            for seed in few:
                for label in labels:
                    rows |= {Row(model, seed, label, bits): None for model in models}
    return list(rows)
