"""Prepares the quantization of a denoiser: the plan of its layers, and ranges from a pass over calibration calls."""
