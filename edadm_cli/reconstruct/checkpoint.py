"""Stores finished units on disk while a reconstruction runs, so that a killed run resumes at its current unit."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.artifacts import UnitLosses, load_tensors, read_model, save_json, save_tensors
from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.unit_data import UnitResult

UNITS_FOLDER = "units"


class UnitCheckpoints:
    """One folder per unit under `units/`; its `unit.json` is written last and shows that the folder is complete.

    Args:
        folder: The folder that `units/` is created in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / UNITS_FOLDER

    def load(self, index: int, unit: Unit) -> UnitResult | None:
        """Returns the result of a unit that was finished earlier, else `None`."""
        unit_folder = self._folder_of(index, unit)
        if not (unit_folder / "unit.json").is_file():
            return None
        losses = read_model(unit_folder / "unit.json", UnitLosses)
        return UnitResult(load_tensors(unit_folder / "params.safetensors"), losses)

    def save(self, index: int, unit: Unit, result: UnitResult) -> None:
        """Stores the result of a finished unit."""
        unit_folder = self._folder_of(index, unit)
        unit_folder.mkdir(parents=True, exist_ok=True)
        save_tensors(unit_folder / "params.safetensors", result.params)
        save_json(unit_folder / "unit.json", result.losses.model_dump(mode="json"))

    def _folder_of(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:04d}-{unit.name or 'denoiser'}"
