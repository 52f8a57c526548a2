"""Turns quantized layers into the quantizer of their input and the integer product behind it.

`product` has both halves of linear layers and convolutions, in integers and in float16, and merges layers that read the
same codes. `lowering` chooses the product of a layer, or says why it has none. `quantizer` is the input's half in the
form that kernels take, `norms` computes it together with a normalization, and `adapted` adds LoRA adapters. `layout`
turns images into rows of channels.
"""
