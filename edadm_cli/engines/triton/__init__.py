"""The CUDA engine."""

from edadm_cli.engines.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
