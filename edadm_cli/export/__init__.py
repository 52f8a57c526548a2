"""Packs quantization parameters into a diffusers folder that `from_pretrained` loads, and checks that it does."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import ExportConfig

STAGE = Stage("export", ExportConfig, finds_itself=True)
