"""The CUDA engine, which runs quantized denoisers on the kernels of `edadm_kernels`.

Begin with `engine`, which decides how a denoiser runs:

- `products`: a layer becomes a quantizer of its input and an integer product. Everything below uses them.
- `fused_blocks`: UNets, whose modules are replaced by fused blocks that we wrote by hand.
- `compiled`: every other denoiser, which keeps its own `forward` and is compiled by torch. An export that
  `from_pretrained` loads runs its layers from here, too.
- `graph_passes`: what is exchanged in the graphs that torch compiles.

The modules beside them: `denoiser` is what the engine returns, and `capture` records its steps as CUDA graphs.
`recording` does the same for calls of loaded exports, as long as `module_state` finds their modules unchanged. `state`
holds what layers share within a step. `times` reads measured times (`times.json`), by which `selection` chooses the
layers that run in float16. `profiling` measures the time of each kernel.
"""

from edadm_cli.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
