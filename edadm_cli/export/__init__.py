"""Quantization parameters packed into a diffusers folder that loads like any other, and the proof that it does."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import ExportConfig

STAGE = Stage("export", ExportConfig, finds_itself=True)
