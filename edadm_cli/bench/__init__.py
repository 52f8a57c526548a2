"""Measures how exact, fast and small a quantized denoiser is, and what limits its speed."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import BenchConfig

STAGE = Stage("bench", BenchConfig, repeats=True, finds_itself=True)
