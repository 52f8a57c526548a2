"""Units that are done, on disk while a reconstruction runs, so that a killed one goes on with the unit it was in."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.artifacts import load_json, load_tensors, save_json, save_tensors
from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.learn import UnitResult

UNITS_FOLDER = "units"


class UnitCheckpoints:
    """One folder a unit under `units/`; its `unit.json`, written last, says that it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / UNITS_FOLDER

    def load(self, index: int, unit: Unit) -> UnitResult | None:
        """The result of a unit that was finished before, else `None`."""
        place = self._place(index, unit)
        if not (place / "unit.json").is_file():
            return None
        losses = load_json(place / "unit.json")
        return UnitResult(params=load_tensors(place / "params.safetensors"), **losses)

    def save(self, index: int, unit: Unit, result: UnitResult) -> None:
        """Keep the result of a finished unit."""
        place = self._place(index, unit)
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "params.safetensors", result.params)
        save_json(place / "unit.json", result.losses())

    def _place(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:04d}-{unit.name}"
