"""The blocks of UNets, fused into few kernels, which we wrote by hand.

`assembly` replaces a UNet's modules, by class, with those of the other modules: `residual` (residual blocks and
resamplers), `transformer` (transformer blocks) and `attention`.
"""
