"""Loads, describes, samples and calls diffusion models.

The modules by topic; to read about the whole, begin with `loading`, `sampling`, `calls` and `units`:

- **What a model is**: `registry` (models known by name), `architecture` and `random_models` (the same with random
  weights), `shipped`, `digits`, `emoji`, `families` (what is known of each kind of denoiser).
- **From a name to a pipeline**: `loading` asks `locating` for the files (`hub` fetches them), `folder`, `files`,
  `weights` and `component_config` for checks of them, `checkpoints` for the conversion of single files, and
  `from_folder` or `latent_diffusion` for the pipeline, which `loaded` describes. `containment` and `quiet` keep
  libraries from asking, fetching and printing meanwhile; `full_precision` refuses models that are quantized already.
- **Where the weights are**: `placement` decides, `gpu_memory` measures, `stored` and `stored_denoiser` leave large
  weights on disk.
- **Sampling**: `sampling` samples images of given seeds, with `call_arguments`, `prompts`, `images`, `output_size`,
  `encoding`, `schedulers`, `watched_scheduler`, `failures`, `tokenizers`, `random_numbers`, `repeatable` and
  `real_statistics`.
- **Calls of the denoiser**: `calls` takes a call apart into tensors and a template, and `call_templates` builds it
  again; `calibration` builds those of the calibration set, `example_calls` random ones; `predictions` finds the
  prediction in what a denoiser returns.
- **The denoiser's structure**: `units` finds its layers and the blocks that are reconstructed as one.
- **A run's model**: `collected` reads how trajectories were sampled, and loads the model again.
"""
