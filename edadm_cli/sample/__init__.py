"""Samples images from an export."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import SampleConfig

STAGE = Stage("sample", SampleConfig, finds_itself=True, folder="samples")
