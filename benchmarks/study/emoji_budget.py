"""The sensitivity that all rows of `benchmarks/emoji.py` with mixed bits share: that of the recipe `default`."""

from __future__ import annotations

import os
import shutil

from learner import link_collection, variant_recipe

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import SelectConfig, SensitivityConfig
from edadm_cli.select.stage import run as select
from edadm_cli.sensitivity.stage import run as measure

VARIANT, GROUP_SIZE = "default", 32


def choose_samples(folder: RunFolder, variant: str, seed: int, device: str, most: int | None) -> tuple[int, ...]:
    """Chooses the calibration set of a variant, of at most some samples; returns how many come from each step."""
    recipe, samples = variant_recipe(variant, None)
    chosen = {name: value for name, value in recipe.select.model_dump().items() if value is not None}
    chosen["num_samples"] = min(samples, most or samples)
    config = SelectConfig(seed=seed, device=device, **chosen)
    return select(config, folder).counts


def measure_layers(collection: RunFolder, folder: RunFolder, seed: int, device: str, most: int | None) -> None:
    """Measures the errors of all layers, also in groups; the inputs have eight bits, as a budget is for weights.

    With at most some samples, in a trial, as few bits and images as possible are measured.
    """
    link_collection(collection, folder)
    choose_samples(folder, VARIANT, seed, device, most)
    recipe = variant_recipe(VARIANT, None)[0]
    trial = {} if most is None else {"num_images": 1, "num_samples": 1, "weight_bits": (3, 8)}
    common = {"recipe": recipe, "activation_bits": (8,), "group_size": GROUP_SIZE, "seed": seed, "device": device}
    measure(SensitivityConfig(**common, **trial), folder)


def link_sensitivity(source: RunFolder, target: RunFolder) -> None:
    """Makes the measurement appear in another run with the same calibration set; its files are hard links."""
    place = target.path("sensitivity")
    if not place.exists():
        shutil.copytree(source.path("sensitivity"), place, copy_function=os.link)
