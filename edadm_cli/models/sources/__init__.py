"""From the files of a model to its components: finds, fetches, checks and opens them.

`locating` finds the files of a model by its name, and `hub` fetches those that are on the Hugging Face hub. `folder`
checks a diffusers folder before any library reads it, with `files` (which files are read), `weights` (in which form),
`trusted_classes` (which classes it may name) and `component_config` (whether a configuration is sound). `from_folder`
builds the pipeline of a checked folder, and `stored_denoiser` opens its denoiser without loading the weights.
`containment` keeps libraries from asking the user or the network meanwhile, and `full_precision` refuses models that
are quantized already. Single checkpoint files are converted by `edadm_cli.models.checkpoints`.
"""
