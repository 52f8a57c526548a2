"""Calls a pipeline: with which prompts, images and sizes, and the samples that it generates from given seeds.

`sampling` samples images of given seeds, which `seeds` decides. `call_arguments` finds which arguments a pipeline
takes; `prompts`, `images` and `output_size` find their values; `encoding` encodes all prompts before the first image.
`watched_scheduler` keeps the last sample and seeds the noise of each step, and `failures` decides whether the model is
at fault when sampling fails.
"""
