"""Full-precision trajectories, their conditioning, and the mid-block features that tell the steps apart."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import CollectConfig

STAGE = Stage("collect", CollectConfig, parallel=True)
