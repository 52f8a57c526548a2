"""An export's quality: against real images, its prompts, and full precision of the same seeds."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import EvaluateConfig

STAGE = Stage("evaluate", EvaluateConfig, parallel=True)
