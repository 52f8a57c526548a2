"""Units that are done, on disk while a reconstruction runs, so that a killed one goes on with the unit it was in."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edadm_cli.artifacts import load_tensors, read_model, save_json, save_tensors
from edadm_cli.models.units import Unit
from edadm_cli.reconstruct.unit_data import UnitResult

UNITS_FOLDER = "units"


class _Losses(BaseModel):
    """What a finished unit learned, besides its parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss_before: float
    loss_after: float
    curve: list[float]
    loss_soft: float | None = None
    undecided: float | None = None
    is_nearest: bool = False


class UnitCheckpoints:
    """One folder a unit under `units/`; its `unit.json`, written last, says that it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / UNITS_FOLDER

    def load(self, index: int, unit: Unit) -> UnitResult | None:
        """Returns the result of a unit that was finished before, else `None`."""
        place = self._place(index, unit)
        if not (place / "unit.json").is_file():
            return None
        losses = read_model(place / "unit.json", _Losses)
        return UnitResult(params=load_tensors(place / "params.safetensors"), **dict(losses))

    def save(self, index: int, unit: Unit, result: UnitResult) -> None:
        """Keeps the result of a finished unit."""
        place = self._place(index, unit)
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "params.safetensors", result.params)
        save_json(place / "unit.json", result.losses())

    def _place(self, index: int, unit: Unit) -> Path:
        return self.folder / f"{index:04d}-{unit.name}"
