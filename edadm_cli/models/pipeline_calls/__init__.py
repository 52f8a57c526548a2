"""Calls a pipeline: with which prompts, images and sizes, and the samples that it generates from given seeds.

`sampling` samples images of given seeds, which `seeds` decides. `parameters` reads which arguments a pipeline takes,
and `call_arguments` finds their values, with `prompts`, `images` and `output_size`. `encoding` encodes all prompts
before the first image. `watched_scheduler` keeps the last sample and seeds the noise of each step, and `failures`
decides whether the model is at fault when sampling fails. `recorded_sampling` records how the final sample follows from
the predictions, and `backward_sweep` takes directions of the final sample back through all calls.
"""
