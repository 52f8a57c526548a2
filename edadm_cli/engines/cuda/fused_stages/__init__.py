"""The blocks of UNets as stages of few kernels, which we wrote by hand.

`assembly` replaces a UNet's modules, by class, with the stages of the other modules: `residual` (residual blocks and
resamplers), `transformer` (transformer blocks) and `attention`.
"""
