"""Refuses a model whose denoiser is quantized already: trajectories are those of full precision."""

from __future__ import annotations

from pathlib import Path

from edadm_cli.errors import InputError
from edadm_cli.models.architecture import DENOISER_NAMES, FURTHER_DENOISERS
from edadm_cli.models.sources.files import read_json_object

_LONGEST_SHOWN = 80  # characters of a method's name in a message


def require_full_precision(folder: Path) -> None:
    """Checks that the configurations of a folder's denoisers name no quantization.

    Args:
        folder: A diffusers folder; a denoiser that it does not have is passed over.

    Raises:
        InputError: A denoiser is quantized, or its configuration cannot be read.
    """
    for name in (*DENOISER_NAMES, *FURTHER_DENOISERS):
        config = folder / name / "config.json"
        quantization = read_json_object(config).get("quantization_config") if config.is_file() else None
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            by = f" by '{method[:_LONGEST_SHOWN]}'" if isinstance(method, str) else ""
            raise InputError(
                f"The denoiser '{name}' of {folder} is quantized already{by}, and a model in full precision is "
                "expected.",
                hint="give --model the model that it was made from",
            )
