"""Selects the step of each trajectory that is used for calibration, by TDAC or another strategy."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import SelectConfig

STAGE = Stage("select", SelectConfig)
