"""The CUDA engine, which runs quantized denoisers on the kernels of `edadm_kernels`."""

from edadm_cli.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
