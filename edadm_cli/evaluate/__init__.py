"""Measures the quality of an export against real images, its prompts, and full precision with the same seeds."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import EvaluateConfig

STAGE = Stage("evaluate", EvaluateConfig, parallel=True, finds_itself=True)
