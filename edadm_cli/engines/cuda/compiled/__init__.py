"""Denoisers that keep their own `forward`, with layers that multiply codes, and are compiled by torch.

`plain` builds one from any exported denoiser. `layer_product` is the layer that multiplies codes; loaded exports run
it, too. The other modules save work where a structure is known: `shared_input` quantizes an input once for several
layers, `flux` and `joint_attention` join operations of blocks, `conditioning` computes what the adaptive normalizations
of all blocks read at once, and `held_prompts` computes the keys and values of a prompt once per image.
"""
