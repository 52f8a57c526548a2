"""Reads and writes the results of a reconstruction: the plan of the layers, and their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edadm_cli.artifacts.artifact import Artifact
from edadm_cli.artifacts.files import save_json
from edadm_cli.artifacts.payloads import load_payload

if TYPE_CHECKING:
    from torch import Tensor

    from edadm_cli.quant.plan import QuantizationPlan

PARAMS_FILE = "quant_params.safetensors"
PLAN_FILE = "plan.json"


def save_plan(folder: Path, plan: QuantizationPlan) -> None:
    """Writes `plan.json`; fields that are null are left out."""
    save_json(folder / PLAN_FILE, plan.model_dump(mode="json", exclude_none=True))


def load_plan(reconstruction: Artifact) -> QuantizationPlan:
    """Returns the plan of a reconstruction: the bits of its layers, and the layers left in float.

    Raises:
        InputError: `plan.json` is missing or not a plan.
    """
    from edadm_cli.quant.plan import QuantizationPlan

    return load_payload(reconstruction, PLAN_FILE, QuantizationPlan)


def load_params(reconstruction: Artifact) -> Mapping[str, Tensor]:
    """Returns the quantization parameters of a reconstruction by name; each is read, to the CPU, when it is asked for.

    Raises:
        InputError: `quant_params.safetensors` is missing or not readable.
    """
    from edadm_cli.artifacts.streaming import TensorFile

    return TensorFile(reconstruction.file(PARAMS_FILE))
