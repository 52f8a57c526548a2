"""Range search and fine-grained block reconstruction: from a calibration set to quantization parameters."""
