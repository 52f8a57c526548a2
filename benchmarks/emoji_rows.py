"""The rows of `benchmarks/emoji.py`: variants of recipes, bit widths and seeds, those that matter most first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from learner import variant_recipe
from learner_variants import BEFORE

VARIANTS = {
    "default": "default",
    "before": BEFORE,
    "paper, 300 iterations": "paper+learn.iterations=300",
    "q-diffusion, 300 iterations": "q-diffusion+learn.iterations=300+learn.weight_learning_rate=0.1"
    "+learn.activation_learning_rate=0.001",
    "default, float inputs 5%": 'default+learn.channel_values=["weight-scale","bias"]+ranges.float_input_share=0.05',
    "four steps, float inputs, 300 iterations": "thorough+learn.iterations=300",
    "four steps, 300 iterations": "thorough+learn.iterations=300+ranges.float_input_share=0",
    "ptq4dm": "ptq4dm",
    "rtn": "rtn",
    "ranges-only": "default+learn.granularity=none",
    "no TDAC": "default+select.strategy=uniform",
    "no layer losses": "default+learn.layer_loss_weight=0",
    "neither": "default+select.strategy=uniform+learn.layer_loss_weight=0",
    "radius median": "default+select.density_quantile=0.5",
    "layer losses 0.8, absolute": "default+learn.layer_loss_weight=0.8+learn.relative_layer_losses=false",
}
FLOAT_INPUTS = ("default, float inputs 5%", "four steps, float inputs, 300 iterations", "four steps, 300 iterations")
PUBLISHED = ("paper, 300 iterations", "q-diffusion, 300 iterations")
MAIN = (*FLOAT_INPUTS, "default", *PUBLISHED, "ptq4dm", "rtn", "ranges-only")
CLAIMS = ("neither", "no layer losses", "no TDAC", "before")
FEW = ("frechet", "frechet_spatial", "frechet_imagenet", "kernel_imagenet")  # metrics that need all the pictures
MODELS = ("emoji-sd", "emoji-dit")


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
    def learns(self) -> bool:
        """Whether anything is learned, which takes most of a row's time."""
        learn = variant_recipe(self.variant, None)[0].learn
        return learn.granularity != "none" and learn.iterations != 0

    @property
    def images(self) -> float:
        """Share of the pictures that the row generates: a quarter where one field is changed."""
        return 1.0 if self.label in MAIN else 0.25

    @property
    def name(self) -> str:
        """Name of the row in file names."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.model} {self.label} {self.bits} {self.seed}".lower())


def rows_in_order(models: list[str], seeds: list[int]) -> list[Row]:
    """Returns all rows, those that matter most first."""
    unlearned = ("rtn", "ptq4dm", "ranges-only")
    fields = [label for label in VARIANTS if label not in (*MAIN, *CLAIMS)]
    plan: list[tuple[Sequence[str], Sequence[str], list[int]]] = [
        (("default", *unlearned), ("w4a8",), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a4",), seeds[:1]),
        (PUBLISHED[:1], ("w4a8",), seeds[:1]),
        (FLOAT_INPUTS, ("w4a8",), seeds[:1]),
        (FLOAT_INPUTS[:1], ("w4a4", "w3a8"), seeds[:1]),
        (("neither", "no layer losses", "no TDAC"), ("w4a8",), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w8a8", "w3a8"), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a8",), seeds[:2]),
        (CLAIMS, ("w4a8",), seeds[:2]),
        (PUBLISHED, ("w4a8", "w4a4"), seeds[:1]),
        (("default", "rtn", "ptq4dm"), ("w4a8",), seeds),
        (("default", *unlearned), ("w6a6",), seeds[:1]),
        (CLAIMS, ("w4a8",), seeds),
        (("default", *unlearned), ("w4a4",), seeds),
        (fields, ("w4a8",), seeds[:1]),
        (("default", *PUBLISHED, *unlearned), ("w4a8", "w8a8", "w4a4", "w3a8", "w6a6"), seeds),
        (fields, ("w4a8",), seeds),
    ]
    rows: dict[Row, None] = {}
    for labels, widths, few in plan:
        for bits in widths:
            for seed in few:
                for label in labels:
                    rows |= {Row(model, seed, label, bits): None for model in models}
    return list(rows)
