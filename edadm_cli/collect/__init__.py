"""Records full-precision trajectories, their conditioning, and mid-block features, which TDAC compares steps by."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import CollectConfig

STAGE = Stage("collect", CollectConfig, parallel=True)
