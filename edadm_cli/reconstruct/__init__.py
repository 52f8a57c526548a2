"""Range search and fine-grained block reconstruction: from a calibration set to quantization parameters."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import ReconstructConfig

STAGE = Stage("reconstruct", ReconstructConfig, parallel=True)
