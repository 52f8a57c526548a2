"""Loads, describes, samples and calls diffusion models.

To read about the whole, begin with `loading`, `pipeline_calls.sampling`, `denoiser_calls.calls` and `units`. The
packages and modules by topic:

- **What a model is**: `registry` (models known by name, in `registry.toml`), `architecture` (in `architectures/`) and
  `random_models` (the same with random weights, with `random_numbers` and `tokenizers`), `shipped`, `digits` and
  `emoji` (with `real_statistics`), `families` (what is known of each kind of denoiser).
- **From a name to a pipeline**: `loading` returns a model that `loaded` describes. `sources` finds, checks and opens
  its files, `checkpoints` converts single files, and `quiet` keeps libraries from printing meanwhile.
  `latent_diffusion` and `schedulers` have classes that diffusers lacks, which folders on disk name by their module.
- **Where the weights are**: `placement` decides, `gpu_memory` measures, and `stored` leaves large weights on disk.
- **Sampling**: `pipeline_calls`.
- **Calls of the denoiser**: `denoiser_calls`; `example_calls` builds calls with random values, and `repeatable` makes
  results on a GPU the same bytes each time.
- **The denoiser's structure**: `units` finds its layers and the blocks that are reconstructed as one.
- **A run's model**: `collected` reads how trajectories were sampled, and loads the model again.
"""
