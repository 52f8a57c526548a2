"""What a denoiser's quantization starts from: the plan of its layers, and ranges from a pass over calibration calls."""
