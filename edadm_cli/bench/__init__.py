"""Parity first, then speed: how fast, how small and how exact a quantized denoiser is, and what bounds it."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import BenchConfig

STAGE = Stage("bench", BenchConfig, repeats=True, finds_itself=True)
