"""Which step of each trajectory calibrates: TDAC, and the strategies it is compared with."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import SelectConfig

STAGE = Stage("select", SelectConfig)
