"""Measures the error of each layer at each number of bits, so that a budget of bits is spent where it matters."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import SensitivityConfig

STAGE = Stage("sensitivity", SensitivityConfig)
