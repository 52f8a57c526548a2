"""The CUDA engine."""

from edadm_cli.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
